#!/usr/bin/env bash
# From nothing to a trained Llama in minutes: makes .venv, installs, prepares the bundled book,
# trains, and prints what the model learned. Rerun it at any time: it continues where it was.
#   ./launch/quickstart.sh               on the CPU, or on what the installed JAX sees
#   ./launch/quickstart.sh --extra=cuda  installs JAX for NVIDIA GPUs first; tpu: for Cloud TPUs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

RUN=runs/quickstart
REQUIREMENT="."
for argument in "$@"; do
  case "$argument" in
    --extra=cuda | --extra=tpu) REQUIREMENT=".[${argument#--extra=}]" ;;
    *) die "$argument: quickstart.sh takes --extra=cuda or --extra=tpu, and nothing else" ;;
  esac
done
make_venv "$ROOT/.venv" "$REQUIREMENT"
cd "$ROOT"
PYTHON="$ROOT/.venv/bin/python"

if [ -f "$RUN/data/manifest.json" ]; then
  say "the book is prepared in $RUN/data"
else
  say "preparing the book (Moby Dick, public domain) with a tokenizer of 4,096 pieces trained on it"
  "$PYTHON" -m llamajax.prepare --input=launch/text/moby_dick.txt --tokenizer=train:4096 \
    --validation_fraction=0.05 --output="$RUN/data"
fi

say "training (Ctrl-C saves and leaves; rerun to continue)"
"$PYTHON" -m llamajax.train --config=configs/quickstart.py --workdir="$RUN"

"$PYTHON" launch/quickstart_result.py "$RUN"
if [ -f llamajax/generate.py ]; then
  say "a sample"
  "$PYTHON" -m llamajax.generate --checkpoint="$RUN" --prompt="Call me Ishmael." \
    --max_new_tokens=60 --temperature=0.8 --seed=0
fi
say "report: $RUN/report.html"
