#!/usr/bin/env bash
# One node, as many processes as the first argument says; the rest goes to train.
#   ./launch/local.sh 8 --config=configs/llama2_7b.py --workdir=runs/llama2_7b ...
set -euo pipefail
exec python -m llamajax.launch --processes_per_node="$1" -- python -m llamajax.train "${@:2}"
