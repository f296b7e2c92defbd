"""Search other ways to run a config on the same devices, ranked by predicted speed.

Every mesh, policy of recomputation and number of microbatches that the config and the model allow
is estimated by the formulas of `estimate` and `roofline`; what cannot fit is dropped; the most
promising are compiled, until as many as wanted fit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from jax.sharding import AbstractMesh

from llamajax import sharding
from llamajax.backends import Target
from llamajax.backends.platforms import platform_facts
from llamajax.config import MeshConfig, RunConfig, from_json_dict, to_json_dict
from llamajax.config.schema import Remat
from llamajax.errors import UserError, say
from llamajax.models.machine_choices import check_mesh, resolve_attention, with_loss_chunk
from llamajax.models.memory import held_bytes
from llamajax.ops.attention_own import is_own, own_function
from llamajax.planning.compilation import node_of
from llamajax.planning.estimate import axes_slow_share, sent_bytes
from llamajax.planning.planner import Plan, make_plan
from llamajax.planning.roofline import Prediction, link_seconds, predict

_MOST_ROWS = 8  # of a microbatch on a device: more changes little but memory
_SLACK = 1.05  # XLA recomputes more where memory is short, and then takes less than is estimated
_MOST_REFUSED = 3  # compilations that do not fit, for each one wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A variant of the run with its estimates. held_bytes: that a device cannot do without."""

    config: RunConfig
    mesh: AbstractMesh
    held_bytes: float
    prediction: Prediction | None


def search(config: RunConfig, target: Target, *, cache: Path | None, wanted: int) -> list[Plan]:
    """Return compiled plans, those that fit first, each group by predicted speed.

    Raises UserError for a run with stages, where the device is unknown to the table, or nothing can
    fit.
    """
    if config.data.stages:
        raise UserError(
            "--search ranks one step, and a run with data.stages has one in each: search without "
            "data.stages (with the batch and length of one stage), then plan the run with them"
        )
    if target.entry is None or target.entry.peak(config.train.dtype) is None:
        raise UserError(
            f"--search ranks by predicted speed, and the {config.train.dtype} peak of "
            f"{target.machine.device_kind!r} is not in the device table: plan without --search"
        )
    nodes = set(map(node_of(target), target.devices))
    if target.entry.slow_bytes_per_s is None and len(nodes) > 1:
        raise UserError(
            f"--search ranks by predicted speed, and how fast {target.entry.name} sends between "
            "nodes is not in the device table: plan without --search"
        )
    if is_own(config.train.attention):
        own_function(config.train.attention)  # a misspelt one makes no mesh impossible
    plans: list[Plan] = []
    for candidate in candidates(config, target):
        fitting = sum(plan.fits is not False for plan in plans)
        if fitting >= wanted or len(plans) >= wanted * (1 + _MOST_REFUSED):
            break
        mesh, t = sharding.describe(candidate.mesh), candidate.config.train
        say(
            f"{fitting} of {wanted} found; compiling {mesh}, accumulation {t.accumulation_steps}, "
            f"remat {t.remat}"
        )
        plans.append(make_plan(candidate.config, target, cache=cache))

    def rank(plan: Plan) -> tuple[bool, float]:
        return plan.fits is False, -plan.prediction.tokens_per_s if plan.prediction else 0.0

    return sorted(plans, key=rank)


def candidates(config: RunConfig, target: Target) -> list[Candidate]:
    """Return all variants that are allowed and may fit, the fastest by estimate first."""
    limit = target.entry.limit_bytes
    found = []
    for sizes in meshes(len(target.devices)):
        for variant in _variants(config, sizes):
            with contextlib.suppress(UserError):
                found.append(estimate(from_json_dict(to_json_dict(variant)), target))
    found = [c for c in found if c.prediction and c.held_bytes <= limit * _SLACK]
    if not found:
        raise UserError(
            f"no mesh, accumulation and recomputation makes this run fit on {target.text} "
            f"({limit / 2**30:.1f} GiB a device): use more or larger devices"
        )
    return sorted(found, key=lambda c: (-c.prediction.tokens_per_s, c.held_bytes))


def meshes(num_devices: int, axes: tuple[str, ...] = sharding.AXES) -> Iterator[dict[str, int]]:
    """Yield every way to write a number of devices as a product of axis sizes."""
    if len(axes) == 1:
        yield {axes[0]: num_devices}
        return
    for size in range(1, num_devices + 1):
        if num_devices % size == 0:
            for others in meshes(num_devices // size, axes[1:]):
                yield {axes[0]: size, **others}


def estimate(config: RunConfig, target: Target) -> Candidate:
    """Estimate a run by formulas alone; raise UserError where its mesh is not allowed.

    On platforms that run one collective at a time nothing is hidden where `tensor` splits: of
    Llama3-70B on h100:8x8 with fsdp 16 x tensor 4 20.9 of 24.3 s are waited for by the compiled
    program.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    sharding.check_slices(sizes, target.devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    config = with_loss_chunk(config, target.machine.platform, sizes)
    check_mesh(config, mesh)
    nodes = sharding.node_numbers(sizes, target.devices, node_of(target))
    links_s = {
        axes: link_seconds(sent, sent * axes_slow_share(axes, sizes, nodes), target.entry)
        for axes, sent in sent_bytes(config, sizes).items()
    }
    facts = platform_facts(target.machine.platform)
    hides = sizes["tensor"] == 1 or not facts.one_collective_at_a_time
    return Candidate(
        config=config,
        mesh=mesh,
        held_bytes=held_bytes(config, sizes),
        prediction=predict(
            config,
            sizes,
            target.entry,
            links_s,
            attention=resolve_attention(config, target.machine, mesh).impl,
            waits_s=None if hides else sum(links_s.values()),
        ),
    )


def _variants(config: RunConfig, sizes: dict[str, int]) -> Iterator[RunConfig]:
    """Yield the config on this mesh with every accumulation and policy of recomputation."""
    rows, left = divmod(config.data.global_batch_size, sizes["data"] * sizes["fsdp"])
    if left:
        return
    attention = config.train.attention if sizes["sequence"] == 1 else "auto"
    for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
        # a pipeline takes all its rows at once, a microbatch at a time
        if sizes["stage"] == 1 and rows // accumulation > _MOST_ROWS:
            continue
        if sizes["stage"] > 1 and accumulation > 1:
            continue
        for remat in get_args(Remat):
            steps = {"accumulation_steps": accumulation, "remat": remat}
            train = dataclasses.replace(config.train, attention=attention, **steps)
            yield dataclasses.replace(config, mesh=MeshConfig(**sizes), train=train)
