"""Where the time of traced steps went, beside what the plan of the same program expects.

The trace (XPlane) names the operations that each device ran; the program's text says what each one
is. Two operations of one kind at the same time count once.
"""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.planning.compilation import abstract_step, compiled_facts_of, present_devices
from llamajax.planning.hlo import Instruction, Program
from llamajax.planning.hlo_products import flops_of
from llamajax.planning.planner import predict_step
from llamajax.planning.roofline import Prediction
from llamajax.planning.traffic import axes_of_groups, groups_of
from llamajax.training.setup import Setup

# Of a device's plane: XLA's lines of operations on TPUs, streams of kernels on GPUs.
_OPERATION_LINES = ("XLA Ops", "Async XLA Ops", "Stream")
_NESTED = ("while", "conditional", "call", "async-update")  # what runs inside has its own events
# What to try where most time is lost, by part.
_ADVICE = {
    "products": "a larger microbatch, or other backend.compiler_options",
    "attention": "another train.attention; `llamajax doctor` says what works here",
    "communication": "another mesh or more tokens a device; `llamajax plan --search` ranks them",
    "other": "a train.remat that recomputes less",
    "data": "more data.num_threads or data.prefetch_batches, or a faster disk",
    "idle": "longer steps: the host, or operations that are too small, leave the devices idle",
}
# device -> (part, mesh axes) -> starts and ends in nanoseconds
Busy = dict[Any, dict[tuple[str, str], list[tuple[float, float]]]]


def kinds_of_operations(text: str, setup: Setup) -> dict[str, tuple[str, str]]:
    """Return part and mesh axes of each operation of a compiled program by its name.

    Parts are products, attention, communication and other. Operations that only contain others are
    left out.
    """
    program, found = Program(text), {}
    for name, instructions in program.computations.items():
        for i in instructions.values():
            if i.operation in _NESTED:
                continue
            if i.operation.endswith("-done") and i.operands[0] in found:
                found[i.name] = found[i.operands[0]]
                continue
            part, collective = _part(i, program.inner(i)), program.started_by(i, name)
            axes: tuple[str, ...] = ()
            # a fusion with products holds the collective that runs beside them
            if collective and (part == "other" or i.operation != "fusion"):
                part = "communication"
                axes = axes_of_groups(groups_of(collective, setup.mesh), setup.mesh.shape)
            found[i.name] = (part, "+".join(axes))
    return found


def _part(i: Instruction, inner: list[Instruction]) -> str:
    if i.is_attention_kernel or any("/attention/" in j.attributes for j in (i, *inner)):
        return "attention"
    return "products" if any(map(flops_of, (i, *inner))) else "other"


def read_trace(trace: Path, kinds: Mapping[str, tuple[str, str]], module: str) -> Busy:
    """Return when each device of process 0 was busy with which part of a program's operations."""
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    busy: Busy = collections.defaultdict(lambda: collections.defaultdict(list))
    for plane in jax.profiler.ProfileData.from_file(f"{files[-1]}").planes:
        is_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if is_device and not line.name.startswith(_OPERATION_LINES):
                continue
            for event in line.events:
                stats = dict(event.stats)
                operation = stats.get("hlo_op") or (_operation(event.name) if is_device else None)
                if operation is None:
                    continue  # work of the host
                kind = kinds.get(operation)
                if stats.get("hlo_module", module) != module:
                    kind = ("other programs", "")
                elif kind is None:
                    if not is_device:
                        continue  # contains others
                    kind = ("unknown", "")
                device = plane.name if is_device else stats.get("device_ordinal", 0)
                busy[device][kind].append((event.start_ns, event.start_ns + event.duration_ns))
    return busy


def _operation(name: str) -> str:
    """Return the name of an operation in an event's, `%fusion.3 = f32[8] fusion(...)`."""
    return re.match(r"%?([\w.\-]*)", name)[1]


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the seconds that intervals in nanoseconds cover together."""
    spans = np.array(sorted(intervals), dtype=np.float64).reshape(-1, 2)
    if not len(spans):
        return 0.0
    ends = np.maximum.accumulate(spans[:, 1])
    before = np.concatenate([[spans[0, 0]], ends[:-1]])
    return float(np.sum(np.maximum(ends - np.maximum(spans[:, 0], before), 0.0))) / 1e9


def measure(busy: Busy, *, num_steps: int, data_wait_s: float) -> dict[str, Any]:
    """Return means over devices, seconds a step, of what devices did.

    data_wait_s: of all steps together, that no device had a batch to work on.
    """
    sums: collections.Counter[str] = collections.Counter()
    links: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for kinds in busy.values():
        everything = [span for spans in kinds.values() for span in spans]
        alone = [s for (p, _), spans in kinds.items() if p != "communication" for s in spans]
        window = (min(a for a, _ in everything), max(b for _, b in everything))
        sums["step_s"] += (window[1] - window[0]) / 1e9
        sums["idle_s"] += (window[1] - window[0]) / 1e9 - _length(everything)
        sums["exposed_communication_s"] += _length(everything) - _length(alone)
        for part in {part for part, _ in kinds} - {"communication"}:
            sums[f"{part.replace(' ', '_')}_s"] += _length(kinds[part, ""])
        for (part, axes), spans in kinds.items():
            if part == "communication":
                links[axes]["total_s"] += _length(spans)
                links[axes]["exposed_s"] += _length([*alone, *spans]) - _length(alone)
    scale = len(busy) * num_steps
    found = {name: sums[name] / scale for name in ("step_s", "products_s", "attention_s")}
    found |= {name: value / scale for name, value in sorted(sums.items())}
    found["data_wait_s"] = min(data_wait_s / num_steps, found["idle_s"])
    found["communication_s"] = {
        axes or "one device": {name: value / scale for name, value in times.items()}
        for axes, times in sorted(links.items())
    }
    return found


def predicted(setup: Setup, update: Any) -> Prediction | None:
    """Return what a plan for the devices that are here predicts; None where they are unknown."""
    target = present_devices(setup.machine)
    if target.entry is None:
        return None
    step = abstract_step(setup.config, target)
    return predict_step(step, compiled_facts_of(update, step, 0.0))


def lines(found: Mapping[str, Any], plan: Prediction | None) -> Iterator[str]:
    """Yield the summary as a table for people, and what to try next."""
    sent_s = sum(plan.links_s.values()) if plan else 0.0
    planned = plan and {
        "products_s": plan.products_s,
        "attention_s": plan.attention_s,
        "other_s": plan.memory_s,
        "exposed_communication_s": sent_s - plan.hidden_s,
        "idle_s": plan.bubble_s,
        "step_s": plan.step_time_s,
    }
    rows = [("products", "products_s"), ("attention", "attention_s"), ("other", "other_s")]
    rows += [("communication waited for", "exposed_communication_s"), ("idle", "idle_s")]
    rows += [
        ("  of it waiting for data", "data_wait_s"),
        ("of no known operation", "unknown_s"),
    ]
    rows += [("other programs", "other_programs_s"), ("step", "step_s")]
    yield f"{'seconds a step, mean of devices':<34}{'measured':>10}{'planned':>10}"
    for label, name in rows:
        if name in found:
            expected = f"{planned[name]:.4f}" if planned and name in planned else "-"
            yield f"  {label:<32}{found[name]:>10.4f}{expected:>10}"
        if name == "exposed_communication_s":
            for axes, times in found["communication_s"].items():
                sent = plan and plan.links_s.get(axes)
                expected = "-" if sent is None else f"{sent:.4f}"
                yield f"    along {axes:<26}{times['total_s']:>10.4f}{expected:>10}"
    yield _advice(found, planned)


def _advice(found: Mapping[str, Any], planned: Mapping[str, float] | None) -> str:
    """Return what to try next: about what takes most, or most above its plan."""
    parts = {
        "communication": "exposed_communication_s", "other": "other_s", "idle": "idle_s",
        "data": "data_wait_s", "attention": "attention_s", "products": "products_s",
    }  # fmt: skip
    if planned is None:
        del parts["products"]  # they are what a step is for
    lost = {
        part: found.get(name, 0.0) - (planned or {}).get(name, 0.0) for part, name in parts.items()
    }
    lost["idle"] -= lost["data"]
    worst = max(lost, key=lost.get)
    more = "above its plan" if planned else "beside products"
    return f"most time {more}: {worst}, {lost[worst]:.4f} s a step; try {_ADVICE[worst]}"
