"""Prints how much sooner a run's second start reaches its first step, as programs are kept by then.

    python benchmarks/second_start.py --rounds=5 -- --config=configs/quickstart.py
    python benchmarks/second_start.py --rounds=5 -- --config=configs/quickstart.py \
        --config.backend.name=npu --config.backend.plugin=/path/lib.so \
        --config.backend.repairs=donation,compile_cache

Each round takes an empty folder of programs, starts `llamajax.train` with what follows `--`, ends
it at its first step, and starts it again. A time is from the command to that step, with imports.
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


def time_to_first_step(arguments: list[str], folder: Path, name: str) -> tuple[float, float]:
    """Seconds from starting `train` to its first step, and of processors; it is then killed."""
    command = [sys.executable, "-m", "llamajax.train", *arguments]
    command += [f"--workdir={folder / name}", f"--config.backend.compile_cache={folder / 'kept'}"]
    command += ["--config.train.log_every=1"]
    began, used = time.perf_counter(), processor_s()
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                took = time.perf_counter() - began
                process.send_signal(signal.SIGKILL)
                process.wait()
                return took, processor_s() - used
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
            first, second = (
                time_to_first_step(flags.arguments, Path(folder), name) for name in ("a", "b")
            )
        rows.append((*first, *second))
        print(f"round {number}: {' '.join(f'{value:.1f}' for value in rows[-1])}", file=sys.stderr)
    first, first_cpu, second, second_cpu = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    ratio = statistics.median(row[0] / row[2] for row in rows)
    ratio_cpu = statistics.median(row[1] / row[3] for row in rows)
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {flags.rounds} rounds, medians")
    print("| seconds | first start | second start | ratio |\n| --- | ---: | ---: | ---: |")
    print(f"| to the first step | {first:.1f} | {second:.1f} | {ratio:.2f} |")
    print(f"| of processors | {first_cpu:.1f} | {second_cpu:.1f} | {ratio_cpu:.2f} |")


if __name__ == "__main__":
    main()
