"""Checks that a model, its batches and its sequences divide over a mesh."""

import math
from collections.abc import Iterator, Mapping

from jax.sharding import Mesh

from llamajax.config.schema import TrainConfig
from llamajax.errors import combine
from llamajax.sharding.axes import WEIGHTS, axes_of
from llamajax.sharding.mesh import batch_shards

_NAMES = {
    "V": "vocabulary (padded)",
    "D": "model.hidden_size",
    "F": "model.intermediate_size",
    "N": "model.num_heads",
    "K": "model.num_kv_heads",
}


def check_divides(
    dims: Mapping[str, int],
    mesh: Mesh,
    *,
    batch: int,
    seq_len: int | None = None,
    train: TrainConfig | None = None,
) -> None:
    """Raise one UserError naming every size that the mesh does not divide, with the nearest fit.

    `dims` is ModelConfig.dims; `batch` counts samples a step; `seq_len` tokens of a sample, where
    they are split; `train` says in which microbatches, and None: in one. Nothing is padded or
    replicated silently, except that layers need not divide over stages: layers of zeros are added.
    """
    size = train.microbatch_size if train else 1
    problems = [
        *_weight_problems(dims, mesh),
        *_batch_problems(mesh, batch, train.accumulation_steps if train else 1, size),
        *(_sequence_problems(mesh, seq_len) if seq_len else ()),
        *_stage_problems(dims["L"], mesh, size, train.pipeline_rounds if train else 1),
    ]
    if problems:
        raise combine(problems, title="this model and batch do not divide over this mesh:")


def _weight_problems(dims: Mapping[str, int], mesh: Mesh) -> Iterator[str]:
    for letter, name in _NAMES.items():
        entry = WEIGHTS[letter]
        parts = math.prod(mesh.shape[axis] for axis in axes_of(entry))
        if dims[letter] % parts:
            where = " x ".join(f"mesh.{axis}" for axis in axes_of(entry))
            fits = [n for n in range(1, dims[letter] + 1) if dims[letter] % n == 0]
            near = sorted(fits, key=lambda n: abs(n - parts))[:2]
            yield (
                f"{name} = {dims[letter]} does not divide over {where} = {parts}; choose {where} "
                f"among the divisors of {dims[letter]}, the nearest are {near[0]} and {near[-1]}"
            )


def _batch_problems(
    mesh: Mesh, batch: int, accumulation: int, microbatch_size: int
) -> Iterator[str]:
    stages = mesh.shape["stage"]
    names = {
        "mesh.data x mesh.fsdp": batch_shards(mesh),
        "train.accumulation_steps": accumulation,
        "mesh.stage": stages,
        "train.microbatch_size": microbatch_size if stages > 1 else 1,
    }
    parts = math.prod(names.values())
    if batch % parts:
        where = " x ".join(name for name, n in names.items() if n > 1)
        yield (
            f"data.global_batch_size = {batch} does not divide by {where} = {parts}; "
            f"{_multiples(batch, parts)}"
        )


def _sequence_problems(mesh: Mesh, seq_len: int) -> Iterator[str]:
    pieces, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    # each device has a piece from the front and the mirrored one from the back, of equal length
    unit = tensor if pieces == 1 else pieces * math.lcm(2, tensor)
    if seq_len % unit:
        why = "between the blocks each device of mesh.tensor has a part of the tokens"
        if pieces > 1:
            why = f"mesh.sequence = {pieces} gives each device two pieces of a sample, and {why}"
        yield (
            f"data.seq_len = {seq_len} does not divide by {unit} ({why}); "
            f"{_multiples(seq_len, unit)}"
        )


def _stage_problems(layers: int, mesh: Mesh, microbatch_size: int, rounds: int) -> Iterator[str]:
    stages = mesh.shape["stage"]
    if stages > 1:
        if stages * rounds > layers:
            where = "mesh.stage" + (" x train.pipeline_rounds" if rounds > 1 else "")
            yield (
                f"model.num_layers = {layers} is less than {where} = {stages * rounds}: a stage "
                f"would have no layer; make it at most {layers}"
            )
        return
    for name, value in {"pipeline_rounds": rounds, "microbatch_size": microbatch_size}.items():
        if value > 1:
            yield (
                f"train.{name} = {value} is for a pipeline, and mesh.stage = 1 makes none; set it "
                "to 1, or mesh.stage to 2 or more"
            )


def _multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"make it {below} or {below + step}" if below else f"make it {step}"
