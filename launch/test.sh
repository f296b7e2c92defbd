#!/usr/bin/env bash
# Makes .venv with the test extra and runs the tests, two files at a time; arguments go to pytest.
#   ./launch/test.sh                 everything
#   ./launch/test.sh -m 'not slow'   without the heavy compile checks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

make_venv "$ROOT/.venv" ".[test]"
add_pjrt_cpu "$ROOT/.venv"
cd "$ROOT"
say "running the tests"
exec "$ROOT/.venv/bin/python" -m pytest --numprocesses=2 --dist=loadfile "$@"
