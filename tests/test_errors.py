"""How a verb ends: exit codes, and what becomes of standard output that nobody takes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax import cli, report
from llamajax.errors import ExitCode, TransientError, UserError
from llamajax.verbs import STOP_SIGNALS, run_verb

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")

_PRINTS = "print('x' * 100_000)"
_ENDS = {
    "at the end": "print('x')",
    "while it prints": _PRINTS,
    "flushed": "print('x', flush=True)",
    "as it leaves": "print('x'); sys.exit(0)",
    "with its help": "from llamajax import report; report.main(['--help'])",
}


@pytest.fixture
def handlers():
    """Run a verb in this process: afterwards, signals do what they did before."""
    numbers = (*STOP_SIGNALS, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    waker = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(waker)
    for number, handler in before.items():
        signal.signal(number, handler)


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def verb(body: str) -> list[str]:
    """The command of a verb whose main does `body`."""
    return [
        sys.executable,
        "-c",
        "import sys\nfrom llamajax.verbs import run_verb\n"
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


@pytest.mark.usefixtures("handlers")
def test_other_refusals_of_the_system_stay_failures_of_ours(capsys):
    def main(argv: list[str]) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_verb(main)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0),
        (None, 0),
        (79, 79),
        (UserError("no x; write y"), 2),
        (TransientError("no x; write y"), 75),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_exit_codes(outcome, code: int, capsys):
    def main(argv: list[str]) -> int:
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as left:
        run_verb(main)
    assert left.value.code == code
    assert capsys.readouterr().err == ("error: no x; write y\n" if code in (2, 75) else "")


def test_standard_output_may_be_closed():
    command = verb("sys.stdout.write('x'); print('y')")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("handlers")
def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        run_verb(lambda argv: report.main(["--help"]))
    assert left.value.code == 0
    assert "llamajax report" in capsys.readouterr().out


def test_a_verb_does_not_look_for_rubbish_all_the_time():
    """A start makes objects by the hundred thousand; Python would look through them at each 700."""
    one = "import gc; before = gc.get_stats()[0]['collections']; kept = [[] for _ in range(10_000)]"
    body = f"{one}; print(gc.get_stats()[0]['collections'] - before)"
    done = subprocess.run(verb(body), check=True, capture_output=True, text=True)
    assert done.stdout == "0\n"


def test_the_documented_exit_codes_are_those_of_the_code():
    text = (Path(__file__).parents[1] / "docs" / "launching.md").read_text()
    table = re.findall(r"^\| (\d+) \| (.+) \| (yes|no) \|$", text, re.MULTILINE)
    yes = {True: "yes", False: "no"}
    assert table == [(str(int(c)), c.meaning, yes[c.restart_helps]) for c in ExitCode]


@pytest.mark.parametrize("name", cli.verbs())
def test_every_verb_ends_by_run_verb(name: str):
    source = (Path(cli.__file__).parent / f"{name}.py").read_text()
    main = source.partition('if __name__ == "__main__":\n')[2]
    assert main.endswith("    run_verb(main)\n")


_HALF_WRITTEN = """
    import os, signal, time
    from pathlib import Path
    hidden = Path(argv[0])
    try:
        hidden.write_text("half")
        os.kill(os.getpid(), int(argv[1]))
        time.sleep(60)
    finally:
        hidden.unlink()
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_unwinds_and_ends_in_143(tmp_path: Path, number: int):
    hidden = tmp_path / "hidden"
    done = ended([*verb(_HALF_WRITTEN), str(hidden), str(int(number))])
    assert done == (143, "", f"stopped by {signal.Signals(number).name}\n")
    assert not hidden.exists()


def ended(command: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(number: int):
    body = f"import os; os.kill(os.getpid(), {int(number)}); print('goes on')"
    ignore = f"import signal, os, sys; signal.signal({int(number)}, signal.SIG_IGN); "
    command = [sys.executable, "-c", ignore + "os.execv(sys.argv[1], sys.argv[1:])", *verb(body)]
    assert ended(command) == (0, "goes on\n", "")


def test_a_verb_that_does_not_unwind_is_ended():
    """As in a compiler, which runs no handler; here the exception is swallowed."""
    body = """
    import llamajax.verbs, os, signal, time
    llamajax.verbs._UNWIND_WITHIN_S = 0.1
    while True:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except SystemExit:
            pass
"""
    assert ended(verb(body)) == (143, "", "stopped by SIGTERM\n")


def test_a_stop_that_is_swallowed_is_raised_again_and_one_that_unwinds_is_not():
    body = """
    import llamajax.verbs, os, signal, time
    llamajax.verbs._RAISE_EVERY_S = 0.01
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)
    except SystemExit:
        pass
    try:
        time.sleep(60)
    finally:
        try:
            raise OSError
        except OSError:
            signal.raise_signal(signal.SIGTERM)
        print("cleaned up")
"""
    assert ended(verb(body)) == (143, "cleaned up\n", "stopped by SIGHUP\n")


def test_a_second_ctrl_c_waits_for_nothing():
    body = """
    import llamajax.verbs, os, signal, time
    llamajax.verbs._UNWIND_WITHIN_S = 1000
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
    assert ended(verb(body)) == (143, "", "stopped by SIGINT\n")


def test_sigusr1_writes_the_stacks_and_ends_nothing():
    body = """
    import os, signal
    def where_it_is():
        os.kill(os.getpid(), signal.SIGUSR1)
    where_it_is()
    print("goes on")
"""
    code, out, err = ended(verb(body))
    assert (code, out) == (0, "goes on\n")
    assert "where_it_is" in err


_TELLS = {
    "0": "print('x' * 9000, file=sys.stderr, flush=True)",
    "2": "from llamajax.errors import UserError; raise UserError('no')",
    "1": "raise RuntimeError('ours')",
    "143": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
}


@needs_full_disk
@pytest.mark.parametrize("env", [BUFFERED, BUFFERED | {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&1 | true"])
@pytest.mark.parametrize("code", _TELLS)
def test_standard_error_that_refuses_changes_no_exit_code(where: str, code: str, env):
    script = f'set -o pipefail; "$@" {where}'
    command = ["bash", "-c", script, "bash", *verb(_TELLS[code])]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=env)
    assert (done.returncode, done.stdout) == (int(code), b"")


def test_no_file_takes_the_place_of_a_closed_stream():
    """Libraries write to descriptors 1 and 2, whatever file has them."""
    body = """
    import os
    sys.exit(sum(os.readlink(f"/proc/self/fd/{n}") == "/dev/null" for n in range(3)))
"""
    assert subprocess.run(["sh", "-c", '"$@" 2>&- >&- <&-', "sh", *verb(body)]).returncode == 3
