"""How a verb ends: exit codes, and what becomes of standard output that nobody takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax.config import parse_command_line
from llamajax.errors import UserError, run_verb

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")

_PRINTS = "print('x' * 100_000)"
_ENDS = {
    "at the end": "print('x')",
    "while it prints": _PRINTS,
    "flushed": "print('x', flush=True)",
    "as it leaves": "print('x'); sys.exit(0)",
    "with its help": "from llamajax.config import parse_command_line as p; p(['--help'], verb='x')",
}


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def verb(body: str) -> list[str]:
    """The command of a verb whose main does `body`."""
    return [
        sys.executable,
        "-c",
        "import sys\nfrom llamajax.errors import run_verb\n"
        f"def main(argv):\n    {body}\nrun_verb(main)",
    ]


@needs_full_disk
@pytest.mark.parametrize("env", [BUFFERED, BUFFERED | {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("body", _ENDS.values(), ids=_ENDS)
def test_a_full_disk_under_standard_output_is_one_message(body: str, env: dict[str, str]):
    with open("/dev/full", "w") as full:
        done = subprocess.run(verb(body), stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.stderr == (
        "error: standard output could not be written: No space left on device; free some space, "
        "or send it elsewhere\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize("env", [BUFFERED, BUFFERED | {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("body", _ENDS.values(), ids=_ENDS)
def test_a_reader_that_has_seen_enough_ends_it_in_silence(body: str, env: dict[str, str]):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(verb(body), stdout=theirs, stderr=subprocess.PIPE, text=True, env=env)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@needs_full_disk
def test_an_exit_code_of_its_own_stays():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            verb("print('x'); sys.exit(143)"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
        )
    assert done.returncode == 143
    assert done.stderr.startswith("error: standard output could not be written")


def test_other_refusals_of_the_system_stay_failures_of_ours(capsys):
    def main(argv: list[str]) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_verb(main)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code"), [(0, 0), (None, 0), (130, 130), (UserError("no x; write y"), 2)]
)
def test_exit_codes(outcome, code: int, capsys):
    def main(argv: list[str]) -> int:
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as left:
        run_verb(main)
    assert left.value.code == code
    assert capsys.readouterr().err == ("error: no x; write y\n" if code == 2 else "")


def test_standard_output_may_be_closed():
    command = verb("sys.stdout.write('x'); print('y')")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        run_verb(lambda argv: parse_command_line(["--help"], verb="train"))
    assert left.value.code == 0
    assert "llamajax train" in capsys.readouterr().out


def test_a_verb_does_not_look_for_rubbish_all_the_time():
    """A start makes objects by the hundred thousand; Python would look through them at each 700."""
    one = "import gc; before = gc.get_stats()[0]['collections']; kept = [[] for _ in range(10_000)]"
    body = f"{one}; print(gc.get_stats()[0]['collections'] - before)"
    done = subprocess.run(verb(body), check=True, capture_output=True, text=True)
    assert done.stdout == "0\n"
