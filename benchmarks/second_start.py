"""Prints how much sooner a run's second start reaches its first step, as programs are kept by then.

    python benchmarks/second_start.py --rounds=5 -- --config=configs/quickstart.py
    python benchmarks/second_start.py --rounds=5 -- --config=configs/quickstart.py \
        --config.backend.name=npu --config.backend.plugin=/path/lib.so \
        --config.backend.repairs=donation,compile_cache

Each round takes an empty folder of programs, starts `llamajax.train` with what follows `--`, ends
it when its first step is shown, and starts it again. Seconds from the command, imports included,
until the first step begins (the line `ready`) and until its row is shown: the step itself takes as
long in both starts.
"""

import argparse
import datetime
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(arguments: list[str], folder: Path, name: str) -> tuple[float, float, float]:
    """Seconds from starting `train` until its first step begins and is shown, and of processors."""
    command = [sys.executable, "-m", "llamajax.train", *arguments]
    command += [f"--workdir={folder / name}", f"--config.backend.compile_cache={folder / 'kept'}"]
    command += ["--config.train.log_every=1"]
    began, used, ready = time.perf_counter(), processor_s(), 0.0
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready "):
                ready = time.perf_counter() - began
            if line.startswith("step 1/"):
                took = time.perf_counter() - began
                process.send_signal(signal.SIGKILL)
                process.wait()
                return ready, took, processor_s() - used
    raise SystemExit("".join(said[-5:]) + "the run ended before its first step")


def processor_s() -> float:
    """Seconds of processors that ended children have used; other load changes them little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("arguments", nargs="+", help="of llamajax.train, after --")
    flags = parser.parse_args()
    rows = []
    for number in range(1, flags.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            rows.append([start(flags.arguments, Path(folder), name) for name in ("a", "b")])
        took = " | ".join(" ".join(f"{value:.1f}" for value in row) for row in rows[-1])
        print(f"round {number}: {took}", file=sys.stderr)
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {flags.rounds} rounds, medians")
    print("| seconds | first start | second start | ratio |\n| --- | ---: | ---: | ---: |")
    names = ("until the first step begins", "until the first step is shown", "of processors")
    for column, name in enumerate(names):
        first, second = ([row[which][column] for row in rows] for which in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
        medians = (statistics.median(values) for values in (first, second))
        print("| {} | {:.1f} | {:.1f} | {:.2f} |".format(name, *medians, ratio))


if __name__ == "__main__":
    main()
