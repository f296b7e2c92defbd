"""Compile the step that `train` runs for a target, and collect the facts its compiler gives.

The facts are stored by a hash of the lowered program and of what compiles it: the same program
is never compiled twice.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from llamajax import sharding
from llamajax.backends import CompilerOptions, Target
from llamajax.backends.platforms import platform_facts
from llamajax.config import RunConfig
from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.models.llama import Compute
from llamajax.models.machine_choices import (
    check_mesh,
    resolve_attention,
    resolve_compiler_options,
    resolve_compute,
    with_loss_chunk,
)
from llamajax.ops.attention import AttentionChoice
from llamajax.planning.hlo import (
    Collective,
    axes_of_groups,
    collectives,
    device_groups,
    ring_bytes,
    slice_groups,
    slow_share,
)
from llamajax.planning.hlo_overlap import is_in_launch_order, kernel_calls, waited_s
from llamajax.planning.hlo_products import product_flops
from llamajax.planning.roofline import compute_seconds, link_seconds
from llamajax.training.programs import lower_update, program_digest
from llamajax.training.state import StateSpec, TrainState

_FORMAT = 7  # of the stored facts


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes: calls a step, and bytes that a device sends.

    slow_bytes: the part of them that goes from one node, or slice of TPUs, to another. waits_s: the
    seconds a step waits for them, predicted from the order of the program; None where that says
    nothing.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    calls: int
    sent_bytes: float
    slow_bytes: float
    waits_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilerFacts:
    """The compiler's facts of one device's part of the program; bytes.

    temporary_bytes is None where the compiler refused the program for its memory: needed_bytes is
    then what it asked for, if it said so, and traffic is None. product_flops: of all matrix
    products, those of fused kernels left out. digest: `program_digest`. host_bytes: what is kept in
    the host's memory (optim.offload, train.remat_offload), in none of the others.
    """

    arguments_bytes: int | None = None
    temporary_bytes: int | None = None
    needed_bytes: int | None = None
    limit_bytes: int | None = None
    traffic: tuple[Traffic, ...] | None = None
    product_flops: float | None = None
    digest: str = ""
    compile_s: float
    host_bytes: int | None = None
    cached: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step on a mesh of the target's devices, before it is lowered."""

    config: RunConfig
    mesh: Mesh
    target: Target
    attention: AttentionChoice
    compute: Compute
    compiler_options: CompilerOptions
    optimizer: optax.GradientTransformation
    state: TrainState


def abstract_step(config: RunConfig, target: Target) -> PlannedStep:
    """Return the step and its state, with nothing allocated.

    Without the options of `backend.deterministic`: to choose repeatable kernels, XLA for GPUs needs
    the GPU (jax 0.11.2: "cannot enumerate configs in deviceless mode"). Raises UserError where
    model, batch and mesh do not fit, as `train` would.
    """
    mesh = sharding.build_mesh(config.mesh, target.devices)
    check_mesh(config, mesh)
    config = with_loss_chunk(config, target.machine.platform, mesh.shape)
    spec, machine = StateSpec.of(config, mesh), target.machine
    attention = resolve_attention(config, machine, mesh)
    return PlannedStep(
        config=config,
        mesh=mesh,
        target=target,
        attention=attention,
        compute=resolve_compute(config, mesh, attention.impl),
        compiler_options=resolve_compiler_options(config, machine, mesh, deterministic=False),
        optimizer=spec.optimizer,
        state=spec.abstract(),
    )


def lowered_step(step: PlannedStep) -> jax.stages.Lowered:
    """Return the step as a program, not yet compiled."""
    return lower_update(step.config, step.mesh, step.compute, step.optimizer, step.state)


def compiled_facts(step: PlannedStep, *, cache: Path | None) -> CompilerFacts:
    """Lower and compile the step, or read what an earlier compilation of this program gave."""
    lowered = lowered_step(step)
    digest = program_digest(lowered)
    file = None if cache is None else cache / f"{_fingerprint(digest, step)}.json"
    if file is not None and (stored := _read(file)):
        return stored
    began = time.perf_counter()
    try:
        compiled = step.compiler_options.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "deviceless mode" in str(error):
            raise UserError(
                f"--devices={step.target.text}: with the options given (backend.compiler_options, "
                "XLA_FLAGS) XLA needs the device to choose kernels; leave out those that ask for "
                "kernels which repeat their bits"
            ) from None
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        facts = refusal(str(error), time.perf_counter() - began)
    else:
        facts = compiled_facts_of(compiled, step, time.perf_counter() - began)
    facts = dataclasses.replace(facts, digest=digest)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(dataclasses.asdict(facts)))
        except OSError as error:
            say(f"warning: this plan is not kept in {file.parent}: {error.strerror}")
    return facts


def compiled_facts_of(compiled: Any, step: PlannedStep, compile_s: float) -> CompilerFacts:
    """Return the facts of a compiled step; `step` says for which devices."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    temporary = temporary_bytes(memory, step.target.machine.platform)
    return CompilerFacts(
        arguments_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary,
        needed_bytes=memory.argument_size_in_bytes + temporary,
        traffic=traffic(text, step.mesh, node_of(step.target), waits=_waits(text, step)),
        product_flops=product_flops(text),
        compile_s=compile_s,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )


def temporary_bytes(memory: Any, platform: str) -> int:
    """Return the bytes that a program needs beside its arguments, from its `memory_analysis()`.

    libtpu's peak is what it holds against the limit; its temporary memory is more than is in use at
    any time (2026-11-28: 14.1 GiB beside 4.7 of arguments in a program with a peak of 15.2). It
    counts arguments in the host's memory as well (2026-11-29: 1,048 MiB with 1,024 there and 24 on
    the device). Others report no peak, or the sum.
    """
    if platform_facts(platform).says_peak and memory.peak_memory_in_bytes:
        arguments = memory.argument_size_in_bytes + memory.host_argument_size_in_bytes
        return memory.peak_memory_in_bytes - arguments
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + kept


def node_of(target: Target) -> Callable[[Any], int]:
    """Return the function from a device of the target to the number of its node."""
    each = target.devices_a_node
    return sharding.node_of if each is None else lambda device: device.id // each


def traffic(
    text: str,
    mesh: Mesh,
    node: Callable[[Any], int] = sharding.node_of,
    *,
    waits: Mapping[Hashable, float] | None = None,
) -> tuple[Traffic, ...]:
    """Return what a compiled program sends in one run, by kind, axes and dtype; most first.

    node: the number of a device's node. waits: seconds by (kind, axes, dtype).
    """
    sums: dict[tuple, tuple[int, float, float]] = {}
    for collective in collectives(text):
        axes, sent, slow = route(collective, mesh, node)
        if axes:
            key = (collective.kind, axes, collective.dtype)
            calls, sent_before, slow_before = sums.get(key, (0, 0.0, 0.0))
            n = collective.count
            sums[key] = (calls + n, sent_before + n * sent, slow_before + n * slow)
    rows = (
        Traffic(*key, *values, None if waits is None else waits.get(key, 0.0))
        for key, values in sums.items()
    )
    return tuple(sorted(rows, key=lambda row: -row.sent_bytes))


def route(
    collective: Collective, mesh: Mesh, node: Callable[[Any], int] = sharding.node_of
) -> tuple[tuple[str, ...], float, float]:
    """Return the mesh axes of one call, the bytes that a device sends, and those to other nodes."""
    if collective.between_slices:
        positions = {device.id: n for n, device in enumerate(mesh.devices.flat)}
        groups = slice_groups(collective.groups, positions)
    else:
        groups = device_groups(collective.groups, mesh.size)
    axes, sent = axes_of_groups(groups, mesh.shape), ring_bytes(collective, groups, mesh.size)
    nodes = [node(device) for device in mesh.devices.flat]
    return axes, sent, sent * slow_share(collective.kind, groups, nodes)


def _waits(text: str, step: PlannedStep) -> Mapping[Hashable, float] | None:
    """Return the seconds a step waits by (kind, axes, dtype), at the speeds of the device table.

    None where the order of the program does not tell, or a speed is unknown.
    """
    entry, mesh, node = step.target.entry, step.mesh, node_of(step.target)
    speeds = entry and compute_seconds(step.config, mesh.shape, entry, step.attention.impl)
    is_host = platform_facts(step.target.machine.platform).is_host
    if not speeds or is_host or not is_in_launch_order(text):
        return None

    def seconds_of(collective: Collective) -> tuple[Hashable, float]:
        axes, sent, slow = route(collective, mesh, node)
        seconds = link_seconds(sent, slow, entry) or 0.0
        return (collective.kind, axes, collective.dtype), seconds

    return waited_s(
        text,
        seconds_of,
        product_s=1 / entry.product_rate(step.config.train.dtype),
        kernel_s=speeds[1] / max(1, kernel_calls(text)),
    )


def refusal(message: str, compile_s: float) -> CompilerFacts:
    """Return the facts of a program that libtpu refused for its memory, from its message."""
    sizes = [float(n) * 2 ** {"K": 10, "M": 20, "G": 30}[u]
             for n, u in re.findall(r"\b(\d+(?:\.\d+)?)([KMG])\b", message)]  # fmt: skip
    used = re.search(r"Used .* of .* hbm", message) or "exceeds available" in message
    if not used or len(sizes) < 2:
        return CompilerFacts(compile_s=compile_s)
    return CompilerFacts(needed_bytes=int(sizes[0]), limit_bytes=int(sizes[1]), compile_s=compile_s)


def _fingerprint(digest: str, step: PlannedStep) -> str:
    parts = [digest, step.target.text, step.target.machine.versions, _FORMAT]
    parts += [sorted(step.compiler_options.values.items()), step.target.entry]
    parts += [[device.id for device in step.mesh.devices.flat]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(file: Path) -> CompilerFacts | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if stored["traffic"] is not None:
        rows = (row | {"axes": tuple(row["axes"])} for row in stored["traffic"])
        stored["traffic"] = tuple(Traffic(**row) for row in rows)
    return CompilerFacts(**stored | {"cached": True})
