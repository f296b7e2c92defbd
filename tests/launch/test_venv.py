"""Which Python the scripts in launch/ choose, and what an environment that is there is kept for.

The Pythons are shell scripts in a temporary folder: no environment is made, nothing is installed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SYSTEM = "/usr/bin:/bin"

# Answers what venv.sh asks a Python for; `-m venv --clear FOLDER` installs it there.
FAKE = """#!/bin/bash
echo "$*" >>"$HOME/calls"
case "$*" in
  *Py_GIL_DISABLED*) exit {fails} ;;
  *print*) echo {minor} ;;
  *-V*) echo "Python {minor}.1" ;;
  *venv*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
esac
"""


@pytest.fixture
def home(tmp_path):
    """A home folder without pyenv and uv, and a folder that is on PATH."""
    (tmp_path / "bin").mkdir()
    # The system's own Pythons are hidden: none of them works here.
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 20))):
        fake(tmp_path / "bin" / name, fails=127)
    return tmp_path


def fake(path, *, fails=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    minor = path.name.removeprefix("python")
    if "." not in minor:
        minor = "3.14"
    path.write_text(FAKE.format(fails=fails, minor=minor))
    path.chmod(0o755)
    return path


def run(home, *command, **environment):
    environment |= {"HOME": str(home), "PATH": f"{home / 'bin'}:{SYSTEM}"}
    return subprocess.run(["bash", *command], env=environment, capture_output=True, text=True)


def bash(home, code, **environment):
    return run(home, "-c", f"set -euo pipefail; source {LAUNCH}/venv.sh; {code}", **environment)


def chosen(home, **environment):
    done = bash(home, "find_python", **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).relative_to(home).as_posix()


def test_the_newest_tested_python_comes_first(home):
    fake(home / "bin/python3.11")
    fake(home / "bin/python3.12")
    fake(home / "bin/python3.14")
    fake(home / "bin/python3")
    assert chosen(home) == "bin/python3.12"
    fake(home / "bin/python3.13")
    assert chosen(home) == "bin/python3.13"
    assert chosen(home, PREFERRED="python3.11") == "bin/python3.11"
    assert chosen(home, PREFERRED="python3.15") == "bin/python3.13"
    assert chosen(home, PREFERRED="python3.11", PYTHON="python3.14") == "bin/python3.14"


def test_a_python_that_was_not_tested_is_the_last_resort(home):
    fake(home / "bin/python3")
    assert chosen(home) == "bin/python3"


@pytest.mark.parametrize(
    ("folder", "variable"),
    [
        (".pyenv/versions/{}", None),
        ("roots/versions/{}", ("PYENV_ROOT", "roots")),
        (".local/share/uv/python/cpython-{}-linux-x86_64-gnu", None),
        ("data/uv/python/cpython-{}-linux-x86_64-gnu", ("XDG_DATA_HOME", "data")),
        ("pythons/cpython-{}-linux-x86_64-gnu", ("UV_PYTHON_INSTALL_DIR", "pythons")),
    ],
)
def test_folders_of_pyenv_and_uv_are_looked_into(home, folder, variable):
    """The shims on PATH are there and do not work."""
    for release in ("3.12.2", "3.12.10"):
        fake(home / folder.format(release) / "bin/python3.12")
    fake(home / folder.format("3.13.0") / "bin/python3.13", fails=1)
    environment = {variable[0]: str(home / variable[1])} if variable else {}
    assert chosen(home, **environment) == f"{folder.format('3.12.10')}/bin/python3.12"


@pytest.mark.parametrize("environment", [{}, {"PYTHON": "python3.11"}, {"PYTHON": "nothing"}])
def test_no_python_is_one_message_and_exit_code_2(home, environment):
    done = bash(home, 'x="$(find_python)"; echo "$x goes on"', **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == 1
    assert environment.get("PYTHON", "PYTHON=/path/to/python3") in done.stderr


def test_the_running_python_works(home):
    assert bash(home, f"works {sys.executable}").returncode == 0
    assert bash(home, "works /bin/false").returncode == 1


def made(home, **environment):
    """What make_venv says, and the version that the environment has after it."""
    done = bash(home, f"make_venv {home}/.venv . && minor {home}/.venv/bin/python", **environment)
    assert done.returncode == 0, done.stderr
    *said, version = done.stdout.splitlines()
    return "\n".join(said), version


def test_an_environment_is_kept_unless_python_names_another_version(home):
    fake(home / "bin/python3.11")
    said, version = made(home)
    assert ("making" in said, version) == (True, "3.11")
    fake(home / "bin/python3.13")
    for environment, making, newer, wanted in (
        ({}, False, True, "3.11"),
        ({"PREFERRED": "python3.11"}, False, False, "3.11"),
        ({"PYTHON": "python3.11"}, False, False, "3.11"),
        ({"PYTHON": "python3.13"}, True, False, "3.13"),
        ({}, False, False, "3.13"),
    ):
        said, version = made(home, **environment)
        found = ("making" in said, "remove it to get a newer one" in said, version)
        assert found == (making, newer, wanted), environment


@pytest.mark.parametrize("argument", ["--extra=gpu", "--extra", "--help-me", "cuda"])
def test_the_quickstart_refuses_what_it_does_not_know(home, argument):
    done = run(home, str(LAUNCH / "quickstart.sh"), argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {argument}: quickstart.sh takes --extra=cuda or --extra=tpu, and nothing else\n"
    )


@pytest.mark.parametrize(("arguments", "installed"), [((), "."), (("--extra=tpu",), ".[tpu]")])
def test_the_quickstart_installs_the_extra_and_goes_on(home, arguments, installed):
    fake(home / "bin/python3.12")
    shutil.copytree(LAUNCH, home / "launch")
    (home / "pyproject.toml").write_text("")
    done = run(home, str(home / "launch/quickstart.sh"), *arguments)
    assert done.returncode == 0, done.stderr
    calls = (home / "calls").read_text().splitlines()
    (install,) = [call for call in calls if " pip install " in f" {call} "]
    assert install.endswith(f" --editable {installed}")
    assert any(call.startswith("-m llamajax.train ") for call in calls)
