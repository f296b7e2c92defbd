"""A run of two processes under `launch`, hurt at random moments: is every logged value the same?

    python benchmarks/soak.py --faults=30 --workdir=runs/soak [--seed=0] [--steps=360]

Faults, all equally often: SIGKILL of a worker, of the coordinator, of the launcher; SIGTERM of a
worker and of the launcher; SIGSTOP of a worker. Moments: import, compilation or restore, a step, a
save, an evaluation. A launcher that ended is started again with the same command. Prints one row a
fault and, last, whether the metrics equal those of an undisturbed run. On the CPU, with a tiny
model and the book of the quickstart.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llamajax.supervision.comparison import largest_difference, values
from llamajax.supervision.trial import last_step

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
EARLY = ("import", "compile or restore")
LATE = ("step", "save", "evaluation")
_POLL = threading.Event()


class Run:
    """The launcher of one workdir, started again whenever it ended."""

    def __init__(self, workdir: Path, data: Path, steps: int):
        self.workdir, self.said = workdir, workdir.with_suffix(".log")
        train = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{data}"]
        train += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
        train += ["--config.backend.name=cpu", "--config.backend.num_cpu_devices=1"]
        train += ["--config.mesh.fsdp=2", "--config.train.eval_batches=4"]
        launch = [sys.executable, "-m", "llamajax.launch", "--processes_per_node=2"]
        self.command = [*launch, "--max_restarts=1000", "--backoff_s=0", "--", *train]
        self.process: subprocess.Popen | None = None

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

    def log(self) -> str:
        """What worker 0 wrote in this attempt."""
        path = self.workdir / "logs" / "worker_0.log"
        return path.read_text(errors="replace") if path.exists() else ""


def moment(run: Run, kind: str, rng: random.Random) -> Callable[[], bool]:
    """Whether a moment of this kind has come in what runs now."""
    before = last_step(run.workdir)
    match kind:
        case "import":
            until = time.monotonic() + rng.uniform(0.5, 4)
            return lambda: time.monotonic() > until
        case "compile or restore":
            return lambda: "\nsteps " in run.log() and "ready " not in run.log()
        case "step":
            wanted = before + rng.randint(1, 7)
            return lambda: last_step(run.workdir) >= wanted and "ready " in run.log()
        case "save":
            folder = run.workdir / "checkpoints"
            return lambda: any(folder.glob("*.orbax-checkpoint-tmp*"))
        case _:
            after = before - before % 15 + 15  # the config evaluates every 15 steps
            return lambda: last_step(run.workdir) >= after


def hurt(run: Run, fault: str) -> bool:
    """Signal its target; False where that is gone already."""
    rank, number = FAULTS[fault]
    try:
        pid = run.process.pid if rank is None else run.pids[rank]
        os.kill(pid, number)
    except (ProcessLookupError, IndexError):
        return False
    if rank is None:
        run.process.wait()
    return True


def soak(run: Run, *, faults: int, rng: random.Random, steps: int) -> int:
    """Hurt the run so often, or till it is done; the number of faults."""
    done, deck = 0, []
    while done < faults and last_step(run.workdir) < steps - 1:
        run.ensure()
        deck = deck or rng.sample(list(FAULTS), len(FAULTS))
        fault, kind = deck[-1], rng.choice(LATE if "ready " in run.log() else EARLY)
        come = moment(run, kind, rng)
        give_up = time.monotonic() + 300
        while not come() and run.process.poll() is None and time.monotonic() < give_up:
            _POLL.wait(0.005)
        if run.process.poll() is not None or not come() or not hurt(run, fault):
            continue
        at, began = last_step(run.workdir), time.monotonic()
        done += 1
        deck.pop()
        if rng.random() < 0.4:  # the next fault meets it while it starts again
            print(f"| {done} | {fault} | {kind} | {at} | hurt again |", flush=True)
            run.ensure()
            continue
        rows = (run.workdir / "metrics.jsonl").stat().st_mtime_ns if at else 0
        while last_step(run.workdir) < steps - 1:
            run.ensure()
            path = run.workdir / "metrics.jsonl"
            if path.exists() and path.stat().st_mtime_ns != rows and "ready " in run.log():
                break
            _POLL.wait(0.05)
        took = time.monotonic() - began
        print(f"| {done} | {fault} | {kind} | {at} | {took:.0f} |", flush=True)
    return done


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
    faults = soak(run, faults=arguments.faults, rng=rng, steps=steps)
    code = run.finish()
    difference = largest_difference(values(undisturbed.workdir), values(run.workdir))
    same = code == 0 and difference is None
    words = "all logged values are those of the undisturbed run" if same else f"{difference}"
    asked = f" (the run ended before all {arguments.faults})" * (faults < arguments.faults)
    print(f"\n{faults} faults{asked}, exit code {code}: {words}")
    return 0 if same and not asked else 1


if __name__ == "__main__":
    sys.exit(main())
