"""A run of two processes under `launch`, hurt at random moments: is every logged value the same?

    python benchmarks/soak.py --faults=30 --workdir=runs/soak [--seed=0] [--steps=360]

Faults, all equally often: SIGKILL of a worker, of the coordinator, of the launcher; SIGTERM of a
worker and of the launcher; SIGSTOP of a worker. Moments, all equally often where they come: import,
restore, compilation, a step, a save, an evaluation; what a run is at is read from its log, its
files and what it has open. A launcher that ended is started again with the same command. Prints
one row a fault, then how often each moment was hit and whether the metrics equal those of an
undisturbed run. On Linux, on the CPU, with a tiny model and the book of the quickstart.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving.trial import last_step

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "tests" / "training" / "tiny_run.py"
BOOK = REPOSITORY / "launch" / "text"
FAULTS = {
    "kill a worker": (1, signal.SIGKILL),
    "kill the coordinator": (0, signal.SIGKILL),
    "kill the launcher": (None, signal.SIGKILL),
    "SIGTERM a worker": (1, signal.SIGTERM),
    "SIGTERM the launcher": (None, signal.SIGTERM),
    "SIGSTOP a worker": (1, signal.SIGSTOP),
}
EARLY = ("import", "restore", "compilation")  # before the first step of an attempt
LATE = ("step", "save", "evaluation")
# What an attempt is at once worker 0's log has such a line; none is needed for the first.
PHASES = {"import": "", "restore or compilation": "\nsteps ", "steps": "\nready "}
_DELAYS_S = {"import": 2.0, "compilation": 0.5}  # the longest after these have begun
_POLL = threading.Event()


class Run:
    """The launcher of one workdir, started again whenever it ended."""

    def __init__(self, workdir: Path, data: Path, steps: int):
        self.workdir, self.said = workdir, workdir.with_suffix(".log")
        train = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{data}"]
        train += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
        train += ["--config.backend.name=cpu", "--config.backend.num_cpu_devices=1"]
        train += ["--config.mesh.fsdp=2", "--config.train.eval_batches=4"]
        train += ["--config.backend.timeout_s=60"]  # for one that was stopped as it started
        launch = [sys.executable, "-m", "llamajax.launch", "--processes_per_node=2"]
        self.command = [*launch, "--max_restarts=1000", "--backoff_s=0", "--", *train]
        self.process: subprocess.Popen | None = None
        self._ended = self._log()  # of the attempt that was hurt last

    def ensure(self) -> None:
        """Start the launcher unless it runs."""
        if self.process is None or self.process.poll() is not None:
            with self.said.open("ab") as file:
                self.process = subprocess.Popen(
                    self.command, stdout=subprocess.DEVNULL, stderr=file
                )

    def finish(self) -> int:
        """Let it come to its end; the exit code."""
        self.ensure()
        return self.process.wait()

    @property
    def pids(self) -> list[int]:
        """The workers of the newest attempt."""
        found = re.findall(r"pids ([\d, ]+)", self.said.read_text())
        return [int(pid) for pid in found[-1].split(",")] if found else []

    @property
    def phase(self) -> str:
        """What worker 0 is at by its log: "" (between attempts), or one of PHASES."""
        log = self._log()
        if log == self._ended:
            return ""
        text = log.read_text(errors="replace")
        for phase, line in reversed(PHASES.items()):
            if line in text:
                return phase
        return ""

    def _log(self) -> Path:
        """The log of worker 0's newest attempt: a file an attempt, to which a link points."""
        return (self.workdir / "logs" / "worker_0.log").resolve()

    def reads_checkpoint(self) -> bool:
        """Whether a worker has a file of a checkpoint open."""
        for link in (link for pid in self.pids for link in Path(f"/proc/{pid}/fd").glob("*")):
            with contextlib.suppress(OSError):  # closed, or the process is gone
                if re.search(r"/checkpoints/\d+/", str(link.readlink())):
                    return True
        return False

    def hurt(self, fault: str) -> bool:
        """Signal its target; False where that is gone already."""
        rank, number = FAULTS[fault]
        ended = self._log()
        try:
            os.kill(self.process.pid if rank is None else self.pids[rank], number)
        except (ProcessLookupError, IndexError):
            return False
        self._ended = ended
        if rank is None:
            self.process.wait()
        return True


def moment(run: Run, kind: str, rng: random.Random) -> Callable[[], bool | None]:
    """Whether a moment of this kind has come in what runs now; None: it is over."""
    before = last_step(run.workdir)

    def in_phase(phase: str, over: bool) -> bool | None:
        return None if over else run.phase == phase

    match kind:
        case "import":
            return lambda: in_phase("import", run.phase not in ("", "import"))
        case "restore":
            return lambda: None if run.phase == "steps" else run.phase and run.reads_checkpoint()
        case "compilation":
            return lambda: in_phase("restore or compilation", run.phase == "steps")
        case "step":
            wanted = before + rng.randint(1, 7)
            return lambda: run.phase == "steps" and last_step(run.workdir) >= wanted
        case "save":
            folder = run.workdir / "checkpoints"
            return lambda: any(folder.glob("*.orbax-checkpoint-tmp*"))
        case _:
            after = before - before % 15 + 15  # the config evaluates every 15 steps
            return lambda: last_step(run.workdir) >= after


def soak(run: Run, *, faults: int, rng: random.Random, steps: int) -> Counter[str]:
    """Hurt the run so often, or till it is done; how often at each moment."""
    hit: Counter[str] = Counter()

    def rarest(things: Iterable[str]) -> str:
        """One of those that came least often."""
        return min(things, key=lambda thing: (hit[thing], rng.random()))

    num_hit, after_start = 0, False  # whether the next fault comes before the run has started again
    while num_hit < faults and last_step(run.workdir) < steps - 1:
        run.ensure()
        kind, what = rarest(EARLY if after_start else LATE), rarest(FAULTS)
        if not come(run, kind, rng) or not run.hurt(what):
            after_start = False  # too late for this moment, which stays the rarest
            continue
        at, began, num_hit = last_step(run.workdir), time.monotonic(), num_hit + 1
        hit.update((kind, what))
        after_start = rng.random() < 0.5
        took = "hurt again"
        if not after_start:
            took = f"{seconds_to_next_step(run, steps, began):.0f}"
        print(f"| {num_hit} | {what} | {kind} | {at} | {took} |", flush=True)
    return hit


def come(run: Run, kind: str, rng: random.Random) -> bool:
    """Wait for a moment; False where it is missed or the launcher ends first."""
    has, give_up = moment(run, kind, rng), time.monotonic() + 300
    delay_s = rng.uniform(0, _DELAYS_S.get(kind, 0.0))
    while run.process.poll() is None and time.monotonic() < give_up:
        now = has()
        if now:
            _POLL.wait(delay_s)
            now = has()
        if now or now is None:
            return bool(now)
        _POLL.wait(0.002)
    return False


def seconds_to_next_step(run: Run, steps: int, began: float) -> float:
    """Wait till the run, started again where need be, has logged a step after a fault."""
    path = run.workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while last_step(run.workdir) < steps - 1:
        run.ensure()
        if run.phase == "steps" and path.exists() and path.stat().st_mtime_ns != before:
            break
        _POLL.wait(0.05)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--steps", type=int, help="default: 12 a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    workdir, steps = arguments.workdir.absolute(), arguments.steps or 12 * arguments.faults
    workdir.mkdir(parents=True)
    data = workdir / "data"
    prepare = [sys.executable, "-m", "llamajax.prepare", f"--input={BOOK}", "--tokenizer=byte"]
    subprocess.run([*prepare, f"--output={data}"], check=True)
    undisturbed = Run(workdir / "undisturbed", data, steps)
    if undisturbed.finish() != 0:
        print(f"the undisturbed run failed: {undisturbed.said}", file=sys.stderr)
        return 1
    run = Run(workdir / "hurt", data, steps)
    print("| fault | what | when | after step | seconds to the next step |")
    print("| ---: | --- | --- | ---: | ---: |")
    rng = random.Random(arguments.seed)
    hit = soak(run, faults=arguments.faults, rng=rng, steps=steps)
    code = run.finish()
    difference = largest_difference(logged_values(undisturbed.workdir), logged_values(run.workdir))
    same = code == 0 and difference is None
    words = "all logged values are those of the undisturbed run" if same else f"{difference}"
    num_hit = sum(hit[kind] for kind in EARLY + LATE)
    early = f" (the run ended before all {arguments.faults})" * (num_hit < arguments.faults)
    print("\nmoments hit: " + ", ".join(f"{kind} {hit[kind]}" for kind in EARLY + LATE))
    print(f"{num_hit} faults{early}, exit code {code}: {words}")
    return 0 if same and not early else 1


if __name__ == "__main__":
    sys.exit(main())
