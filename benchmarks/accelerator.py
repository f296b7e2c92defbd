"""Measures what a new card does with llamajax, most important first, within a given time.

    python benchmarks/accelerator.py --minutes=5

Needs jax, flax, optax and orbax alone; from a clone, with PYTHONPATH=. In order: versions and
devices; parity of the attention kernel with packed documents; Llama2-7B in three settings; kernels
beside their roofline; Llama-3.2-1B; a model of 32 M; the doctor. Time and memory as predicted stand
beside those measured in the table at the end.

Each result is a line of --output/results.jsonl as soon as it is there. What does not fit the time
or the memory is written as `skipped` or `failed` with the reason. The same command again keeps what
is done and tries the rest; `--restart` begins anew. results.json and the table have all of it.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from accelerator_parts import PARTS, Child, DoesNotFit, Part, versions  # beside this script

from llamajax.config import BackendFlags, key, parse_command_line
from llamajax.errors import UserError
from llamajax.files import write_file
from llamajax.monitoring.jsonl import RowFile, read_lines
from llamajax.verbs import run_verb

# Flags of `train_step.py`.
BACKEND = ("backend", "plugin", "options", "num_cpu_devices", "device_table")
DOES_NOT_FIT = "does not fit"
ROWS, RESULTS, LOG = "results.jsonl", "results.json", "log.txt"
_ENDS_WITHIN_S = 5.0  # after a signal, before it is killed
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorFlags(BackendFlags):
    """Flags of this script."""

    minutes: float = key("time for all of it", default=5.0, above=0)
    output: str = key("folder of the results", default="accelerator", is_path=True)
    restart: bool = key("forget results in the folder", default=False)
    size: Literal["auto", "card", "tiny"] = key("auto: tiny on a CPU", default="auto")
    parts: tuple[str, ...] = key("parts to measure, a,b", default=tuple(p.name for p in PARTS))
    device_table: str | None = key(
        "TOML file with peaks, as backend.device_table", default=None, is_path=True
    )
    part: str | None = key("of the process that measures one part: which", default=None)
    deadline: float = key("of that process: seconds since 1970", default=0.0)
    call: float = key("of that process: when the script was started", default=0.0)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        known = [part.name for part in PARTS]
        for name in sorted({*self.parts} - {*known}):
            yield f"--parts: no part {name!r}; parts: {','.join(known)}"

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output)

    @property
    def step_flags(self) -> dict[str, Any]:
        """Those that choose a backend, as `train_step.py` takes them as well."""
        return {name: getattr(self, name) for name in BACKEND if getattr(self, name)}


def read_rows(folder: Path) -> dict[tuple[str, str], Row]:
    """The newest row of each result, by part and name; a line that a kill cut off is left out."""
    found = {}
    for line in read_lines(folder / ROWS):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["part"], row["name"]] = row
    return found


def add_row(flags: AcceleratorFlags, part: str, name: str, status: str, **found: Any) -> None:
    """Write one result: status `begun`, `done`, `does not fit`, `skipped` or `failed`."""
    file = RowFile(flags.folder / ROWS)
    file.begin()
    now = datetime.datetime.now().isoformat(timespec="seconds")
    row = {"part": part, "name": name, "status": status, "call": flags.call, "at": now} | found
    file.add(row)
    if status != "begun":
        print(f"{part}: {name}: {outcome(row)}", flush=True)


def unsettled(part: Part, flags: AcceleratorFlags) -> list[str]:
    """Names of a part's results that are not done, and that this call has not given up."""
    rows = read_rows(flags.folder)

    def is_settled(row: Row) -> bool:
        given_up = row.get("call") == flags.call and row.get("status") in ("skipped", "failed")
        return row.get("status") in ("done", DOES_NOT_FIT) or given_up

    names = part.names(flags.size)
    return [name for name in names if not is_settled(rows.get((part.name, name), {}))]


def run_child(part: Part, flags: AcceleratorFlags) -> None:
    """Measure what is unsettled of a part in this process, as far as the time goes."""
    import jax

    threading.Thread(target=_end_with_parent, daemon=True).start()
    child = Child(
        flags.size,
        left_s=lambda: flags.deadline - time.time(),
        output=flags.folder,
        backend=flags.step_flags,
    )
    for name in unsettled(part, flags):
        if child.left_s() < part.needs_s:
            return
        add_row(flags, part.name, name, "begun")
        start = time.perf_counter()
        try:
            found = part.measure(child, name)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            small = isinstance(error, DoesNotFit) or "RESOURCE_EXHAUSTED" in str(error)
            status, reason = DOES_NOT_FIT if small else "failed", " ".join(str(error).split())
            add_row(flags, part.name, name, status, reason=reason[:500])
            continue
        add_row(flags, part.name, name, "done", wall_s=time.perf_counter() - start, **found)


def _end_with_parent() -> None:
    """End the process when the other end of its standard input is gone, as after a kill."""
    os.read(0, 1)
    os._exit(1)


def run_part(part: Part, flags: AcceleratorFlags) -> None:
    """Start processes for a part until each of its results is there, or why it is not."""
    deadline = min(flags.deadline, time.time() + part.limit_s)
    why = f"of --minutes={flags.minutes:g}" if deadline == flags.deadline else "of the part's time"
    while names := unsettled(part, flags):
        left_s = deadline - time.time()
        reason = f"{max(left_s, 0):.0f} s {why} were left, it is begun with {part.needs_s:g}"
        if left_s >= part.needs_s:
            problem = _run_process(part, flags, deadline)
            names = unsettled(part, flags)
            rows = read_rows(flags.folder)
            begun = [n for n in names if rows.get((part.name, n), {}).get("call") == flags.call]
            if problem:  # the result that was begun is at fault, or whatever precedes the first
                for name in begun or names:
                    add_row(flags, part.name, name, "failed", reason=problem)
                continue
            reason = f"the results before it left too little {why}"
        for name in names:
            add_row(flags, part.name, name, "skipped", reason=reason)


def _run_process(part: Part, flags: AcceleratorFlags, deadline: float) -> str | None:
    """Measure a part in a new process until the deadline; say how it ended, if not well."""
    command = [sys.executable, __file__, f"--part={part.name}", f"--deadline={deadline}"]
    given = ("output", "size", "call", *BACKEND)
    command += [f"--{name}={getattr(flags, name)}" for name in given if getattr(flags, name)]
    with (flags.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=log, start_new_session=True
        )
    problem = f"ended at its time limit of {deadline - time.time():.0f} s"
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(deadline - time.time(), 0.0))
            problem = f"the process ended with code {code}: {_last_line(flags.folder / LOG)}"
            problem = problem if code else None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # it and what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_WITHIN_S)
        process.stdin.close()
    return problem


def _last_line(file: Path) -> str:
    """The last line of a log that is not empty, of at most 300 characters."""
    return next((line for line in reversed(read_lines(file)) if line.strip()), "")[:300]


def outcome(row: Row) -> str:
    """One result in words."""
    if row["status"] != "done":
        return f"{row['status']}: {row.get('reason', 'no result')}"
    if "step_s" in row:
        mfu = ", ".join(
            f"{name} MFU {100 * row[f'mfu_{name}']:.1f} %"
            for name in ("full", "causal")
            if row[f"mfu_{name}"] is not None
        )
        return (
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['step_s'] * 1e3:.1f} ms a step "
            f"({row['waited_step_s'] * 1e3:.1f} waited for), {mfu or 'peak unknown'}, "
            f"attention {row['attention']}, compiled in {row['compile_s']:.1f} s"
        )
    if "errors" in row:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        bits = "same bits twice" if row["same_bits_twice"] else "OTHER BITS the second time"
        right = "right" if row["right"] else "WRONG"
        return f"{right}: {row['attention']}, relative errors {errors}; {bits}"
    if "ms" in row:
        share = row["roofline_share"]
        of = "peak unknown" if share is None else f"{100 * share:.0f} % of its roofline"
        speeds = f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s, {row['bytes_per_s'] / 1e9:.4g} GB/s"
        return f"{row['ms']:.3f} ms, {speeds}, {of}"
    if "verdict" in row:
        return f"{row['verdict']}, repairs {row['repairs'] or 'none'}, probes {row['counts']}"
    packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
    return f"{row['num_devices']} x {row['device_kind']}, Python {row['python']}, {packages}"


def predicted(row: Row) -> str:
    """A step's time and memory as predicted beside those measured."""
    program, step_s = row["program_bytes"], row["predicted_step_s"]
    words = "time: no prediction for this device"
    if step_s:
        ratio = row["step_s"] / step_s
        words = f"{step_s * 1e3:.1f} ms predicted, {row['step_s'] * 1e3:.1f} measured ({ratio:.2f})"
    if program is not None:
        words += f"; {program / 2**30:.4g} GiB compiled"
    if row["peak_bytes"] is not None:  # of the process: a smaller setting after a larger has its
        words += f", {row['peak_bytes'] / 2**30:.4g} in use at most so far"
    if row["limit_bytes"] is not None:
        words += f", limit {row['limit_bytes'] / 2**30:.2f}"
    return words


def finish(parts: list[Part], flags: AcceleratorFlags) -> int:
    """Write results.json, print the table. Return 0 where nothing is wrong or missing."""
    found, lines = read_rows(flags.folder), ["| part | result | outcome |", "| --- | --- | --- |"]
    wanted = [(part.name, name) for part in parts for name in part.names(flags.size)]
    rows = [found[key] for key in wanted if key in found]
    lines += [f"| {row['part']} | {row['name']} | {outcome(row)} |" for row in rows]
    steps = [row for row in rows if row["status"] == "done" and "step_s" in row]
    lines += [f"| predicted | {row['name']} | {predicted(row)} |" for row in steps]
    table = "\n".join(lines)
    whole = {"size": flags.size, "minutes": flags.minutes, "rows": rows, "table": table}
    write_file(flags.folder / RESULTS, json.dumps(whole, indent=1) + "\n")
    print(f"\n{table}\n\nwritten to {flags.folder / RESULTS}")
    well = all(row["status"] in ("done", DOES_NOT_FIT) and row.get("right", True) for row in rows)
    return int(not (well and len(rows) == len(wanted)))


def environment_row(flags: AcceleratorFlags) -> Row:
    """The row of the first part; empty where there is none yet."""
    return read_rows(flags.folder).get((PARTS[0].name, PARTS[0].names("")[0]), {})


def check_same_environment(flags: AcceleratorFlags) -> None:
    """Refuse to add to the results of other versions: a table has one environment."""
    before = environment_row(flags).get("packages")
    if before is not None and before != versions():
        changed = sorted(set(before.items()) ^ set(versions().items()))
        raise UserError(
            f"--output={flags.folder}: has results of other versions ({changed[:4]}); choose "
            "another folder, or --restart to begin anew"
        )


def main(argv: list[str]) -> int | None:
    """Measure all parts, or be the process of one."""
    flags = parse_command_line(
        argv, AcceleratorFlags, verb="benchmarks/accelerator.py", doc=__doc__
    )
    known = {part.name: part for part in PARTS}
    if flags.part:
        return run_child(known[flags.part], flags)
    parts = [p for p in PARTS if p is PARTS[0] or p.name in flags.parts]
    now = time.time()
    flags = dataclasses.replace(flags, call=now, deadline=now + 60 * flags.minutes)
    flags.folder.mkdir(parents=True, exist_ok=True)
    if flags.restart:
        (flags.folder / ROWS).unlink(missing_ok=True)
    check_same_environment(flags)
    for part in parts:
        run_part(part, flags)
        if part is PARTS[0]:
            row = environment_row(flags)
            if row["status"] != "done":
                raise UserError(f"no device to measure: {row['reason']}")
            if flags.size == "auto":
                size = "tiny" if row["platform"] == "cpu" else "card"
                flags = dataclasses.replace(flags, size=size)
    return finish(parts, flags)


if __name__ == "__main__":
    run_verb(main)
