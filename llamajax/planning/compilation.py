"""Compile the step that `train` runs for a target, and collect the facts its compiler gives.

The facts are stored by a hash of the lowered program and of what compiles it: the same program
is never compiled twice.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llamajax import sharding
from llamajax.backends import CompilerOptions, Machine, Target
from llamajax.backends.devices import find
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
from llamajax.planning.hlo import Collective, Program
from llamajax.planning.hlo_overlap import waited_s
from llamajax.planning.hlo_products import product_flops
from llamajax.planning.roofline import compute_seconds, link_seconds
from llamajax.planning.traffic import Traffic, route, traffic
from llamajax.training.programs import lower_update, program_digest
from llamajax.training.state import StateSpec, TrainState

_FORMAT = 8  # of the stored facts


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
    spec: StateSpec
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
        spec=spec,
        state=spec.abstract(),
    )


def present_devices(machine: Machine) -> Target:
    """Return the devices of a machine that runs, to plan for."""
    devices = tuple(jax.devices())
    return Target("these devices", machine, devices, find(machine.device_kind))


def lowered_step(step: PlannedStep) -> jax.stages.Lowered:
    """Return the step as a program, not yet compiled."""
    return lower_update(step.config, step.mesh, step.compute, step.spec.optimizer, step.state)


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
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    nodes = [node_of(step.target)(device) for device in step.mesh.devices.flat]
    temporary = temporary_bytes(memory, step.target.machine.platform)
    return CompilerFacts(
        arguments_bytes=memory.argument_size_in_bytes,
        temporary_bytes=temporary,
        needed_bytes=memory.argument_size_in_bytes + temporary,
        traffic=traffic(program, step.mesh, nodes, _waits(program, step, nodes)),
        product_flops=product_flops(program),
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


def _waits(
    program: Program, step: PlannedStep, nodes: Sequence[int]
) -> Mapping[Hashable, float] | None:
    """Return the seconds a step waits by (kind, axes, dtype), at the speeds of the device table.

    None where the order of the program does not tell, or a speed is unknown.
    """
    entry, is_host = step.target.entry, platform_facts(step.target.machine.platform).is_host
    if entry is None or is_host or not program.is_in_launch_order:
        return None
    speeds = compute_seconds(step.config, step.mesh.shape, entry, step.attention.impl)
    if speeds is None:
        return None
    kernel_calls = sum(count for i, count in program.executed() if i.is_attention_kernel)

    def seconds_of(collective: Collective) -> tuple[Hashable, float]:
        axes, sent, slow = route(collective, step.mesh, nodes)
        return (collective.kind, axes, collective.dtype), link_seconds(sent, slow, entry)

    waits = waited_s(
        program,
        seconds_of,
        product_s=1 / entry.product_rate(step.config.train.dtype),
        kernel_s=speeds[1] / max(1, kernel_calls),
    )
    return waits if all(map(math.isfinite, waits.values())) else None


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
