#!/usr/bin/env bash
# Makes .venv with the test extra and runs the tests, two at a time; other arguments go to pytest.
#   ./launch/test.sh         each kind of claim at least once: about ten minutes on two cores
#   ./launch/test.sh --all   everything: about half an hour; also against transformers and torch as they are
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

SELECTION=(-m "not slow")
ARGUMENTS=()
LIVE=0
for argument in "$@"; do
  case "$argument" in
    --all) SELECTION=() ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done

make_venv "$ROOT/.venv" ".[test]"
add_pjrt_cpu "$ROOT/.venv"
cd "$ROOT"

if [ "${#SELECTION[@]}" != 0 ]; then
  # LLVM's optimizations are half of a compilation; with --all they are on.
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_backend_optimization_level=0"
else
  # The references were written with this Python and the torch that is pinned for it.
  PYTHON="" PREFERRED=python3.11 make_venv "$ROOT/.venv-live" ".[test,live]"
  add_real_weights "$ROOT/.venv-live"
  add_real_weights "$ROOT/.venv"
  say "comparing with transformers and torch"
  "$ROOT/.venv-live/bin/python" -m pytest -m live "${ARGUMENTS[@]}" || LIVE=$?
fi

say "running the tests"
"$ROOT/.venv/bin/python" -m pytest --numprocesses=2 --dist=worksteal --durations=20 \
  "${SELECTION[@]}" "${ARGUMENTS[@]}" || exit $?
# 5: the arguments name no live test
[ "$LIVE" = 0 ] || [ "$LIVE" = 5 ] || die "the comparison with transformers and torch failed, above"
