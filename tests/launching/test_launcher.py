"""A launcher of one node, with fake workers: codes, logs, restarts, signals, silence."""

import errno
import itertools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamajax import errors
from llamajax.launching import launcher, workers
from llamajax.launching.worker_logs import Echo
from llamajax.launching.workers import WorkerGroup, first_failed


def log(tmp_path: Path, rank: int, attempt: int | None = None) -> str:
    name = f"worker_{rank}.log" if attempt is None else f"worker_{rank}.{attempt}.log"
    return (tmp_path / "logs" / name).read_text()


def starts(tmp_path: Path, rank: int = 0) -> int:
    """How often a worker was started."""
    return len(list((tmp_path / "logs").glob(f"worker_{rank}.*.log")))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def signal_when(
    text: str, log: Path, *numbers: int, then: Callable[[], None] = lambda: None
) -> threading.Thread:
    """Sends the signals to this process, which is the launcher, once `text` is in the log."""

    def watch() -> None:
        poll = threading.Event()
        wanted = text
        for number in numbers:
            while not log.exists() or wanted not in log.read_text():
                poll.wait(0.01)
            os.kill(os.getpid(), number)
            wanted = "got 15"  # the launcher passes every stop signal on as SIGTERM
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_all_finish(launched, tmp_path, capfdbinary):
    lines = "print('rank', rank, os.environ['LLAMAJAX_NUM_PROCESSES'])"
    assert launched(lines, processes_per_node=3) == 0
    assert [log(tmp_path, rank) for rank in range(3)] == [f"rank {r} 3\n" for r in range(3)]
    out, err = capfdbinary.readouterr()
    assert out == b"rank 0 3\n"  # worker 0 on the terminal, the others in their logs only
    assert b"finished" in err


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os._exit(7)", 7, "worker 1 failed: code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "worker 1 was killed by SIGKILL"),
    ],
)
def test_the_first_failure_ends_the_siblings_and_gives_its_code(
    launched, tmp_path, capfd, end, code, words
):
    lines = f"""
print("pid", os.getpid())
if rank == 1:
    wait_for("pid", of=0)
    print("I give up")
    {end}
wait_for_ever()"""
    assert launched(lines) == code
    pid = int(re.search(r"pid (\d+)", log(tmp_path, 0)).group(1))
    assert not is_running(pid)
    err = capfd.readouterr().err
    assert words in err
    assert "  | I give up" in err


def test_children_of_workers_end_as_well(launched, tmp_path):
    lines = """
if rank == 1:
    wait_for("child", of=0)
    os._exit(7)
child = os.fork()
if child:
    print("child", child)
wait_for_ever()"""
    assert launched(lines) == 7
    child = int(re.search(r"child (\d+)", log(tmp_path, 0)).group(1))
    poll = threading.Event()
    for _ in range(1000):  # it was killed; the kernel may take a moment
        if not is_running(child):
            return
        poll.wait(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a worker's child outlived the launch")


def test_failures_are_restarted_and_every_log_is_kept(launched, tmp_path, capfd):
    lines = "print('attempt', attempt)\nif attempt < 2 and rank == 1: os._exit(1)"
    assert launched(lines, max_restarts=3) == 0
    kept = sorted(p.name for p in (tmp_path / "logs").glob("worker_1.*.log"))
    assert kept == ["worker_1.0.log", "worker_1.1.log", "worker_1.2.log"]
    assert log(tmp_path, 1) == log(tmp_path, 1, 2) == "attempt 2\n"
    assert "restart 2 of 3" in capfd.readouterr().err


# Attempt n starts at checkpoint n, completes the next one, and fails.
_SAVES = """
pipe = os.environ["LLAMAJAX_CHECKPOINTS"].partition(":")[0]
if rank != 0:
    os._exit(0)
os.write(int(pipe), b"%d\\n%d\\n" % (attempt, attempt + 1))
"""


@pytest.mark.parametrize(
    ("lines", "max_restarts", "code", "started"),
    [
        ("os._exit(5)", 2, 5, 3),
        ("os._exit(2)", 5, 2, 1),
        (_SAVES + "os._exit(1 if attempt < 4 else 0)", 1, 0, 5),
    ],
    ids=["counted", "no restart helps", "progress"],
)
def test_restarts_by_exit_code(launched, tmp_path, lines, max_restarts, code, started):
    assert launched(lines, max_restarts=max_restarts) == code
    assert starts(tmp_path) == started


def test_an_earlier_launchs_logs_stay(launched, tmp_path):
    assert launched("print('first')") == 0
    assert launched("print('second', attempt)") == 0
    assert log(tmp_path, 0, 0) == "first\n"
    assert log(tmp_path, 0, 1) == "second 1\n"


def test_not_the_worker_is_blamed_that_aborts_for_the_loss_of_another():
    assert first_failed({0: -signal.SIGABRT, 2: -signal.SIGKILL, 3: 1}) == 2
    assert first_failed({0: -signal.SIGABRT, 1: -signal.SIGABRT}) == 0
    assert first_failed({0: 1, 1: 79}) == 1  # the others of a stopped run may see it leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_is_forwarded_once_and_ends_in_143(launched, tmp_path, monkeypatch, number):
    """Two SIGTERMs at once are one to the kernel, but not always: a worker may count them."""
    done, send = [], WorkerGroup.send
    monkeypatch.setattr(errors, "say", done.append)
    monkeypatch.setattr(WorkerGroup, "send", lambda group, n: done.append(n) or send(group, n))
    lines = (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(143))\nprint('ready')\nwait_for_ever()"
    )
    # what a shell starts in the background ignores Ctrl-C, and the launcher would leave it so
    before = signal.signal(number, signal.SIG_DFL)
    thread = signal_when("ready", tmp_path / "logs" / "worker_0.log", number)
    try:
        assert launched(lines, processes_per_node=1, max_restarts=3) == 143
    finally:
        signal.signal(number, before)
    thread.join()
    assert done.count(signal.SIGTERM) == 1
    # before a word, which a terminal may hold up
    assert done[done.index(signal.SIGTERM) + 1].startswith("launch: stopping: waiting")


@pytest.mark.parametrize("where", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | head -n 1"])
def test_a_launch_whose_output_nobody_takes_ends_as_it_would(launch_command, tmp_path, where):
    lines = "print('x' * 99_999)\nos._exit(5 if attempt == 0 else 0)"
    script = f'set -o pipefail; "$@" {where}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *launch_command(lines)], stdout=subprocess.DEVNULL
    )
    assert done.returncode == 0
    assert (tmp_path / "worker_0.1.log").exists()


_REMOVES_ITS_LOGS = """
import shutil
folder = Path(os.readlink("/proc/self/fd/1")).parent
if attempt == 0:
    print("ready")
    shutil.rmtree(folder)
    %s
    print("last words")
    os._exit(5)
print("second attempt")
"""


@pytest.mark.parametrize("then", ["pass", "folder.write_text('in the way')"])
def test_a_log_folder_that_vanishes_ends_nothing(launched, tmp_path, capfd, then):
    """It is made again; where it cannot be, the attempt runs without one."""
    lines = _REMOVES_ITS_LOGS % then
    assert launched(lines, processes_per_node=1, max_restarts=1) == 0
    out, err = capfd.readouterr()
    assert out.endswith("last words\nsecond attempt\n")
    assert "  | last words" in err
    assert ("cannot be written" in err) == (then != "pass")
    if then == "pass":
        assert "second attempt" in log(tmp_path, 0)


def test_a_file_system_without_links_costs_the_short_name_only(launched, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert launched("print('x')", processes_per_node=1) == 0
    assert log(tmp_path, 0, 0) == "x\n"


def test_sigusr1_asks_for_stacks_and_ends_nobody(launched, tmp_path):
    """Worker 1 does not catch it, as a program of somebody else's: it is not sent there."""
    lines = """
import faulthandler
def where_it_is():
    wait_for("where_it_is", of=0)
if rank == 0:
    faulthandler.register(signal.SIGUSR1)
    wait_for("", of=1)
    print("ready")
where_it_is()"""
    thread = signal_when("ready", tmp_path / "logs" / "worker_0.0.log", signal.SIGUSR1)
    assert launched(lines) == 0
    thread.join()
    assert log(tmp_path, 1) == ""


def test_an_echo_never_waits_for_its_reader(tmp_path):
    """The log keeps what a pipe has no room for; it is shown once the reader goes on."""
    text = "".join(f"line {i}\n" for i in range(50_000)).encode()
    (tmp_path / "log").write_bytes(text)
    reading, writing = os.pipe()
    log = os.open(tmp_path / "log", os.O_RDONLY)
    echo = Echo(log, writing)
    echo.copy()
    seen = b""
    while len(seen) < len(text):
        seen += os.read(reading, 1 << 20)
        echo.copy()
    assert seen == text
    os.close(reading)
    (tmp_path / "log").write_bytes(text + b"more")
    echo.copy()
    os.close(writing)
    os.close(log)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (signal.SIGHUP, signal.SIGHUP, "ready\ngot 15\nsaved\n"),  # of a lost terminal
        (signal.SIGTERM, signal.SIGINT, "ready\ngot 15\n"),
    ],
)
def test_only_a_later_ctrl_c_ends_workers_that_save(launched, tmp_path, first, second, words):
    sent = tmp_path / "sent"
    lines = f"""
def save(*_):
    print("got 15")
    while not Path({str(sent)!r}).exists():
        os.sched_yield()
    if {second == signal.SIGINT}:
        wait_for_ever()
    print("saved")
    os._exit(143)
signal.signal(signal.SIGTERM, save)
print("ready")
wait_for_ever()"""
    # The second signal is sent when the worker has got the first.
    log_file = tmp_path / "logs" / "worker_0.log"
    thread = signal_when("ready", log_file, first, second, then=sent.touch)
    assert launched(lines, processes_per_node=1) == 143
    thread.join()
    assert log(tmp_path, 0) == words


def test_a_worker_that_stopped_by_itself_stops_the_others(launched, tmp_path):
    lines = """
if rank == 1:
    os._exit(143)
signal.signal(signal.SIGTERM, lambda *_: (print("told"), os._exit(143)))
print("x")
wait_for_ever()"""
    assert launched(lines, max_restarts=3) == 143
    assert starts(tmp_path, rank=1) == 1


def test_a_worker_killed_by_somebodys_sigterm_is_a_failure(launched, tmp_path):
    lines = "if rank == 1 and attempt == 0: os.kill(os.getpid(), signal.SIGTERM)\n"
    lines += "if attempt == 0: wait_for_ever()"
    assert launched(lines, max_restarts=1) == 0
    assert (tmp_path / "logs" / "worker_1.1.log").exists()


@pytest.fixture
def at_each_look(monkeypatch):
    """Calls a function before each look at the workers; to the launcher, 50 s lie between two."""

    def call(function: Callable[[int], None]) -> None:
        looks = itertools.count()

        def clock() -> float:
            number = next(looks)
            function(number)
            return 50.0 * number

        monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=clock))

    return call


def test_silence_is_a_failure_and_the_stacks_are_in_the_log(
    launched, tmp_path, capfd, monkeypatch, at_each_look
):
    """The worker leaves when it has written its stacks, and the launcher waits for that."""
    lines = """
import faulthandler
def where_it_hangs():
    print("hangs")
    wait_for_ever()
if attempt == 0:
    faulthandler.register(signal.SIGUSR1, chain=True)
    where_it_hangs()"""

    def touch(number: int) -> None:
        for path in (tmp_path / "logs").glob("worker_0.*.log"):
            if "hangs" not in path.read_text():
                os.utime(path, (number, number))

    at_each_look(touch)
    monkeypatch.setattr(launcher, "_STACKS_WITHIN_S", 60.0)
    assert launched(lines, processes_per_node=1, max_restarts=1) == 0
    assert "no progress within 60 s" in capfd.readouterr().err
    assert "in where_it_hangs" in log(tmp_path, 0, 0)


def test_a_worker_that_the_signal_ends_does_not_cut_off_the_stacks_of_others(
    launched, tmp_path, monkeypatch, at_each_look
):
    """Worker 1 writes them after worker 0, which does not catch the signal, has ended."""
    gone = tmp_path / "gone"
    lines = f"""
def write(*_):
    while not Path({str(gone)!r}).exists():
        os.sched_yield()
    print("stacks")
    os._exit(1)
if rank == 1:
    signal.signal(signal.SIGUSR1, write)
print("hangs", os.getpid())
wait_for_ever()"""

    def touch(number: int) -> None:
        logs = list((tmp_path / "logs").glob("worker_?.0.log"))
        if not all("hangs" in path.read_text() for path in logs):
            os.utime(logs[0], (number, number))

    def watch() -> None:
        poll, file = threading.Event(), tmp_path / "logs" / "worker_0.0.log"
        while not file.exists() or not (found := re.fullmatch(r"hangs (\d+)\n", file.read_text())):
            poll.wait(0.01)
        while is_running(int(found[1])):
            poll.wait(0.01)
        gone.touch()

    at_each_look(touch)
    monkeypatch.setattr(launcher, "_STACKS_WITHIN_S", 60.0)
    thread = threading.Thread(target=watch)
    thread.start()
    assert launched(lines, processes_per_node=2) == 124
    thread.join()
    assert "stacks" in log(tmp_path, 1, 0)


def test_without_restarts_silence_ends_with_a_code_of_its_own(launched):
    assert launched("wait_for_ever()", timeout_s=0.5) == 124


def test_a_worker_that_shows_itself_alive_is_left_alone(launched, tmp_path, at_each_look):
    """It never prints: its log is touched."""
    done, file = tmp_path / "done", tmp_path / "logs" / "worker_0.0.log"

    def touch(number: int) -> None:
        if file.exists():
            os.utime(file, (number, number))
        if number == 10:
            done.touch()

    at_each_look(touch)
    lines = f"while not Path({str(done)!r}).exists(): os.sched_yield()"
    assert launched(lines, processes_per_node=1) == 0


def test_workers_of_an_attempt_get_one_port_and_the_next_attempt_another(launched, tmp_path):
    lines = """
print(os.environ["LLAMAJAX_COORDINATOR"])
wait_for("127.0.0.1", of=1 - rank)
os._exit(1)"""
    launched(lines, max_restarts=1)
    first, second = ([log(tmp_path, rank, n) for rank in (0, 1)] for n in (0, 1))
    assert first[0] == first[1] != second[0] == second[1]
    assert re.fullmatch(r"127\.0\.0\.1:\d+\n", first[0])
