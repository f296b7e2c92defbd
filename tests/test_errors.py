"""How a verb ends: exit codes, signals, and standard streams that refuse what is written."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax import report
from llamajax.errors import ExitCode, TransientError, UserError
from llamajax.verbs import STOP_SIGNALS, run_verb

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
both_bufferings = pytest.mark.parametrize("env", [BUFFERED, BUFFERED | {"PYTHONUNBUFFERED": "1"}])
_ENDS = {
    "at the end": "print('x')",
    "while it prints": "print('x' * 100_000)",
    "flushed": "print('x', flush=True)",
    "as it leaves": "print('x'); sys.exit(0)",
    "with its help": "from llamajax import report; report.main(['--help'])",
}


@pytest.fixture
def handlers():
    """Run a verb in this process: afterwards, signals do what they did before."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR1)}
    waker = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(waker)
    for number, handler in before.items():
        signal.signal(number, handler)


def verb(body: str) -> list[str]:
    """Return the command of a verb whose main does `body`."""
    head = "import os, pathlib, signal, sys, time\nimport llamajax.verbs\n"
    return [
        sys.executable, "-c", f"{head}def main(argv):\n    {body}\nllamajax.verbs.run_verb(main)",
    ]  # fmt: skip


def ended(command: list[str], **options) -> tuple[int, str, str]:
    """Return exit code, standard output and error of a command."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run(command, text=True, timeout=50, **streams)
    return done.returncode, done.stdout, done.stderr


@needs_full_disk
@both_bufferings
@pytest.mark.parametrize("body", [*_ENDS.values(), "print('x'); sys.exit(143)"])
def test_a_full_disk_under_standard_output_is_one_message(body, env):
    with open("/dev/full", "w") as full:
        code, _, err = ended(verb(body), stdout=full, env=env)
    assert err == (
        "error: standard output could not be written: No space left on device; free some space, "
        "or send it elsewhere\n"
    )
    # An exit code of its own stays, where it comes to that.
    assert code == (143 if "143" in body and env is BUFFERED else 2)


@both_bufferings
@pytest.mark.parametrize("body", _ENDS.values(), ids=_ENDS)
def test_a_reader_that_has_seen_enough_ends_it_in_silence(body, env):
    ours, theirs = os.pipe()
    os.close(ours)
    assert ended(verb(body), stdout=theirs, env=env) == (0, None, "")
    os.close(theirs)


_ERRORS = {
    "0": "print('x' * 9000, file=sys.stderr, flush=True)",
    "2": "from llamajax.errors import UserError; raise UserError('no')",
    "1": "raise RuntimeError('ours')",
    "143": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
}


@needs_full_disk
@both_bufferings
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&1 | true"])
@pytest.mark.parametrize("code", _ERRORS)
def test_standard_error_that_refuses_changes_no_exit_code(where, code, env):
    script = f'set -o pipefail; "$@" {where}'
    command = ["bash", "-c", script, "bash", *verb(_ERRORS[code])]
    assert ended(command, env=env)[:2] == (int(code), "")


@pytest.mark.parametrize(
    ("closed", "body", "code"),
    [
        (">&-", "sys.stdout.write('x'); print('y')", 0),
        # Libraries write to descriptors 1 and 2, whatever file has them.
        ("2>&- >&- <&-", "sys.exit(sum(os.path.samefile(f'/dev/fd/{n}', os.devnull) "
         "for n in range(3)))", 3),
    ],
)  # fmt: skip
def test_standard_streams_may_be_closed_and_no_file_takes_their_place(closed, body, code):
    command = ["sh", "-c", f'"$@" {closed}', "sh", *verb(body)]
    assert ended(command) == (code, "", "")


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (None, 0, ""),
        (79, 79, ""),
        (UserError("no x; write y"), 2, "error: no x; write y\n"),
        (TransientError("no x; write y"), 75, "error: no x; write y\n"),
        (SystemExit(0), 0, ""),
        (OSError(28, "No space left on device"), None, ""),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_exit_codes(outcome, code, message, capsys):
    def main(argv: list[str]) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(type(outcome) if code is None else SystemExit) as left:
        run_verb(main)
    assert code is None or left.value.code == code
    assert capsys.readouterr().err == message


@pytest.mark.usefixtures("handlers")
def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        run_verb(lambda argv: report.main(["--help"]))
    assert left.value.code == 0
    assert "llamajax report" in capsys.readouterr().out


def test_garbage_is_not_collected_all_the_time():
    """A start makes objects by the hundred thousand; Python would look through them at each 700."""
    one = "import gc; before = gc.get_stats()[0]['collections']; kept = [[] for _ in range(10_000)]"
    body = f"{one}; print(gc.get_stats()[0]['collections'] - before)"
    assert ended(verb(body)) == (0, "0\n", "")


def test_the_documented_exit_codes_are_those_of_the_code():
    text = (Path(__file__).parents[1] / "docs" / "launching.md").read_text()
    table = re.findall(r"^\| (\d+) \| (.+) \| (yes|no) \|$", text, re.MULTILINE)
    yes = {True: "yes", False: "no"}
    assert table == [(str(int(c)), c.meaning, yes[c.restart_helps]) for c in ExitCode]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_unwinds_and_ends_in_143(tmp_path, number):
    body = f"""
    hidden = pathlib.Path(argv[0])
    try:
        hidden.write_text("half")
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
    finally:
        hidden.unlink()
"""
    done = ended([*verb(body), str(tmp_path / "hidden")])
    assert done == (143, "", f"stopped by {signal.Signals(number).name}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(number):
    body = f"os.kill(os.getpid(), {int(number)}); print('goes on')"
    ignore = f"import signal, os, sys; signal.signal({int(number)}, signal.SIG_IGN); "
    command = [sys.executable, "-c", ignore + "os.execv(sys.argv[1], sys.argv[1:])", *verb(body)]
    assert ended(command) == (0, "goes on\n", "")


def test_a_verb_that_does_not_unwind_is_ended():
    """As in a compiler, which runs no handler; here the exception is swallowed."""
    body = """
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
    def where_it_is():
        os.kill(os.getpid(), signal.SIGUSR1)
    where_it_is()
    print("goes on")
"""
    code, out, err = ended(verb(body))
    assert (code, out) == (0, "goes on\n")
    assert "where_it_is" in err
