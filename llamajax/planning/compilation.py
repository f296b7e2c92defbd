"""The step that `train` runs, compiled for a target, and the facts that its compiler gives.

Facts are kept on disk by a hash of the lowered program and of what compiles it: the same program
is never compiled twice.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llamajax import optim, sharding
from llamajax.backends import Target
from llamajax.backends.platforms import platform_facts
from llamajax.config import RunConfig
from llamajax.files import write_file
from llamajax.planning.hlo import (
    axes_of_groups,
    collectives,
    device_groups,
    sent_bytes,
    slice_groups,
    slow_share,
)
from llamajax.training.feed import abstract_batch
from llamajax.training.session import check_mesh, how_to_compute, layout_of
from llamajax.training.state import TrainState, abstract_state
from llamajax.training.step import train_step

# Attention for a GPU that is not here: cuDNN's kernel is built by cuDNN on a GPU. This one holds no
# T x S matrix either, so that the memory of a step is alike, and compiles three times as fast as
# `blocked`.
_WITHOUT_CUDNN = "split"
_FORMAT = 4  # of the stored facts


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes: calls a step, and bytes that a device sends.

    slow_bytes: the part of them that goes from one node, or slice of TPUs, to another.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    calls: int
    sent_bytes: float
    slow_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What the compiler says of one device's part of the program; bytes.

    temporary_bytes is None where the compiler refused the program for its memory: needed_bytes is
    then what it wanted, if it said so, and traffic is None. host_bytes: what rests in the host's
    memory (optim.offload, train.remat_offload), in none of the others.
    """

    arguments_bytes: int | None
    temporary_bytes: int | None
    needed_bytes: int | None
    limit_bytes: int | None
    traffic: tuple[Traffic, ...] | None
    compile_s: float
    host_bytes: int | None = None
    cached: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step on a mesh of the target's devices, before it is lowered.

    runs_attention: the kernel that `train` would use there; attention: the one that is compiled.
    """

    config: RunConfig
    mesh: Mesh
    target: Target
    runs_attention: str
    attention: str
    state: TrainState


def abstract_step(config: RunConfig, target: Target) -> Step:
    """The step and its state, with nothing allocated.

    Raises UserError where model, batch and mesh do not fit, as `train` would.
    """
    mesh = sharding.build_mesh(config.mesh, target.devices)
    check_mesh(config, mesh)
    optimizer = optim.build(config.optim, steps=config.train.steps)
    lora = config.lora if config.lora.rank else None
    return Step(
        config=config,
        mesh=mesh,
        target=target,
        runs_attention=how_to_compute(config, target.machine(), mesh).attention,
        attention=_compute(config, target, mesh).attention,
        state=abstract_state(config.model, optimizer, mesh, lora=lora, layout=layout_of(config)),
    )


def _compute(config: RunConfig, target: Target, mesh: Mesh) -> Any:
    """How `train` would compute there; cuDNN's attention exchanged for one that compiles here."""
    wanted = how_to_compute(config, target.machine(), mesh)
    if wanted.attention != "cudnn":
        return wanted
    return dataclasses.replace(wanted, attention=_WITHOUT_CUDNN)


def lowered_step(step: Step) -> jax.stages.Lowered:
    """The step as a program, not yet compiled."""
    config = step.config
    optimizer = optim.build(config.optim, steps=config.train.steps)
    compute = _compute(config, step.target, step.mesh)
    where = (compute, step.mesh, config.guard)
    update = train_step(optimizer, config.optim, config.train, *where)
    batch = abstract_batch(config.data, step.mesh, batch_size=config.data.global_batch_size)
    return update.lower(step.state, batch)


def compiled_facts(step: Step, *, cache: Path | None) -> Facts:
    """Lower and compile the step, or read what an earlier compilation of this program gave."""
    lowered = lowered_step(step)
    file = None if cache is None else cache / f"{_fingerprint(lowered, step)}.json"
    if file is not None and (stored := _read(file)):
        return stored
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        facts = _refused(str(error), time.perf_counter() - began)
    else:
        facts = _facts(compiled, step, time.perf_counter() - began)
    if file is not None:
        _write(file, facts)
    return facts


def _facts(compiled: Any, step: Step, compile_s: float) -> Facts:
    memory = compiled.memory_analysis()
    temporary = temporary_bytes(memory, step.target.platform)
    return Facts(
        arguments_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary,
        needed_bytes=memory.argument_size_in_bytes + temporary,
        limit_bytes=None,
        traffic=traffic(compiled.as_text(), step.mesh, node_of(step.target)),
        compile_s=compile_s,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )


def temporary_bytes(memory: Any, platform: str) -> int:
    """Bytes that a program needs beside its arguments, from its `memory_analysis()`.

    libtpu's peak is what it holds against the limit; its temporary memory is more than is in use at
    any time (2026-11-28: 14.1 GiB beside 4.7 of arguments in a program with a peak of 15.2). It
    counts arguments in the host's memory as well (2026-11-29: 1,048 MiB with 1,024 there and 24 on
    the device). Others say no peak, or the sum.
    """
    if platform_facts(platform).says_peak and memory.peak_memory_in_bytes:
        arguments = memory.argument_size_in_bytes + memory.host_argument_size_in_bytes
        return memory.peak_memory_in_bytes - arguments
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + kept


def node_of(target: Target) -> Callable[[Any], int]:
    """The function from a device of the target to the number of its node."""
    each = target.devices_a_node
    return sharding.node_of if each is None else lambda device: device.id // each


def traffic(
    text: str, mesh: Mesh, node_of: Callable[[Any], int] = sharding.node_of
) -> tuple[Traffic, ...]:
    """What a compiled program communicates in one run, by kind, axes and dtype; most first."""
    nodes = [node_of(device) for device in mesh.devices.flat]
    places = {device.id: place for place, device in enumerate(mesh.devices.flat)}
    found: dict[tuple, tuple[int, float, float]] = {}
    for collective in collectives(text):
        if collective.between_slices:
            groups = slice_groups(collective.groups, places)
        else:
            groups = device_groups(collective.groups, mesh.size)
        axes = axes_of_groups(groups, mesh.shape)
        if axes:
            sent = sent_bytes(collective, groups, mesh.size) * collective.count
            slow = sent * slow_share(collective.kind, groups, nodes)
            key = (collective.kind, axes, collective.dtype)
            calls, total, between = found.get(key, (0, 0.0, 0.0))
            found[key] = (calls + collective.count, total + sent, between + slow)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return tuple(Traffic(*key, *sums) for key, sums in ordered)


def _refused(message: str, compile_s: float) -> Facts:
    """A program that libtpu refused for its memory, with the figures of its message."""
    sizes = [float(n) * 2 ** {"K": 10, "M": 20, "G": 30}[u]
             for n, u in re.findall(r"\b(\d+(?:\.\d+)?)([KMG])\b", message)]  # fmt: skip
    used = re.search(r"Used .* of .* hbm", message) or "exceeds available" in message
    needed, limit = sizes[:2] if used and len(sizes) >= 2 else (None, None)
    return Facts(
        arguments_bytes=None,
        temporary_bytes=None,
        needed_bytes=None if needed is None else int(needed),
        limit_bytes=None if limit is None else int(limit),
        traffic=None,
        compile_s=compile_s,
    )


def _fingerprint(lowered: Any, step: Step) -> str:
    parts = [lowered.as_text(), step.target.text, step.target.versions, _FORMAT]
    parts += [[device.id for device in step.mesh.devices.flat]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(file: Path) -> Facts | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    rows = stored.pop("traffic")
    kinds = None if rows is None else tuple(
        Traffic(**{**row, "axes": tuple(row["axes"])}) for row in rows
    )  # fmt: skip
    return Facts(**{**stored, "traffic": kinds, "cached": True})


def _write(file: Path, facts: Facts) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(dataclasses.asdict(facts)))
