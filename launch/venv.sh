# Sourced by the scripts of this folder: finds a Python, makes the environment, installs llamajax.
# Environment only, no logic of a run. Expects to be sourced by bash with `set -euo pipefail`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# A Python of 3.11 or newer that can make environments: PYTHON if set, else the first that works;
# a script may name one to try first in PREFERRED.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} ${PREFERRED:+"$PREFERRED"} python3.12 python3.11 python3 python3.13; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then
      die "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module; unset it or name another"
    fi
  done
  die "no Python >= 3.11 with the venv module found; install one (Debian and Ubuntu: apt install" \
    "python3 python3-venv), or name it: PYTHON=/path/to/python3 $0"
}

# make_venv FOLDER REQUIREMENT: FOLDER/bin/python with REQUIREMENT (`.`, `.[test]`) installed.
# A stamp of pyproject.toml and the place of the checkout makes the next call return at once.
make_venv() {
  local folder="$1" requirement="$2" python stamp wanted
  if ! "$folder/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$(find_python)"
    say "making $folder with $python ($("$python" -V))"
    "$python" -m venv --clear "$folder"
  fi
  stamp="$folder/installed-$(printf '%s' "$requirement" | tr -cd 'a-z')"
  wanted="$ROOT $(cksum <"$ROOT/pyproject.toml")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "$folder has llamajax installed ($requirement)"
    return
  fi
  say "installing llamajax ($requirement) into $folder; the first time takes a minute or more"
  (cd "$ROOT" && "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable "$requirement")
  printf '%s\n' "$wanted" >"$stamp"
}

# What the test NPU (tests/npu) is made of. Their own wishes are left out: one would hold JAX back.
add_pjrt_cpu() {
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    xla-cpu-pjrt==0.0.1 lammps-jax-pjrt-cpu==0.11.2 || say "no PJRT CPU plugin here: tests/npu skips itself"
}
