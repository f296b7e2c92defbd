"""What a config leaves to the machine: sizes, attention, how to compute, compiler options."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.backends.platforms import platform_facts
from llamajax.config import RunConfig
from llamajax.models.counts import matrices_per_layer
from llamajax.models.llama import Compute
from llamajax.models.memory import FLOAT32_BYTES
from llamajax.models.pipeline import PipelineOptions
from llamajax.ops.attention import AttentionChoice, choose_attention
from llamajax.ops.attention_own import is_own
from llamajax.sharding.float8 import Float8

_LOSS_CHUNK_TOKENS = (512, 4096)  # the least and the most that are chosen


def with_loss_chunk(config: RunConfig, platform: str, sizes: Mapping[str, int]) -> RunConfig:
    """Return the config with the platform's `train.loss_chunk_tokens` where it leaves them open.

    sizes: of the mesh axes. It is a power of two, so that it divides most numbers of tokens.
    """
    if config.train.loss_chunk_tokens is not None:
        return config
    tokens, room = _LOSS_CHUNK_TOKENS[0], platform_facts(platform).logits_bytes
    each = FLOAT32_BYTES * config.model.padded_vocab_size / sizes["tensor"]
    while room is not None and 2 * tokens * each <= room and tokens < _LOSS_CHUNK_TOKENS[1]:
        tokens *= 2
    train = dataclasses.replace(config.train, loss_chunk_tokens=tokens)
    return dataclasses.replace(config, train=train)


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raise one UserError with everything about the run that its mesh does not divide."""
    batch, seq_len = config.data.global_batch_size, config.data.seq_len
    sharding.check_divides(
        config.model.dims, mesh, batch=batch, seq_len=seq_len, train=config.train
    )


def resolve_attention(config: RunConfig, machine: backends.Machine, mesh: Mesh) -> AttentionChoice:
    """Return the attention of a run, for `auto` the first that the machine supports."""
    t = config.train
    facts = {
        "platform": machine.platform,
        "compute_capability": machine.compute_capability,
        "dtype": t.activation_dtype,
        "head_size": config.model.head_size,
        "seq_len": config.data.seq_len,
        "sequence_parts": mesh.shape["sequence"],
    }
    return choose_attention(t.attention, machine.attention_preferences, **facts)


def proven_attention(
    config: RunConfig, machine: backends.Machine, mesh: Mesh, *, prove: Callable
) -> AttentionChoice:
    """Return the attention of a run; the user's own is proven on this process's first device.

    prove: as in `attention_own`; it may remember what it has proven.
    """
    chosen = resolve_attention(config, machine, mesh)
    if not is_own(chosen.impl):
        return chosen
    model, t, parts = config.model, config.train, mesh.shape["tensor"]
    found, is_named = prove(
        chosen.impl,
        dtype=t.activation_dtype,
        heads=(model.num_heads // parts, model.num_kv_heads // parts),
        head_size=model.head_size,
        seq_len=config.data.seq_len,
        packed=config.data.mask_documents,
    )
    could_keep = t.remat not in ("none", "full") or "attention" in t.remat_keep
    reason, is_again = f"train.attention = {chosen.impl}; {found}", could_keep and not is_named
    if is_again:
        reason += f'; it names nothing "attention", which train.remat = {t.remat} would keep'
    return AttentionChoice(chosen.impl, reason, is_second_best=is_again)


def resolve_compute(config: RunConfig, mesh: Mesh, attention: str) -> Compute:
    """Return how a run computes with this attention."""
    t, float8 = config.train, None
    if t.dtype == "float8":
        float8 = Float8(
            targets=t.float8_targets, gradients=t.float8_gradients, scaling=t.float8_scaling
        )
    return Compute(
        dtype=jnp.dtype(t.activation_dtype),
        remat=t.remat,
        attention=attention,
        loss_chunk_tokens=t.loss_chunk_tokens,
        z_weight=t.z_loss,
        remat_keep=t.remat_keep,
        remat_offload=t.remat_offload,
        split_tokens=mesh.shape["tensor"] > 1,
        pipeline=PipelineOptions(
            microbatch_size=t.microbatch_size, rounds=t.pipeline_rounds, remat_stage=t.remat_stage
        ),
        float8=float8,
    )


def resolve_compiler_options(
    config: RunConfig, machine: backends.Machine, mesh: Mesh, *, deterministic: bool | None = None
) -> backends.CompilerOptions:
    """Return the options that the step of a run is compiled with, present devices or absent.

    deterministic: whether its bits are to be repeated; None: as `backend.deterministic` says.
    """
    if deterministic is None:
        deterministic = config.backend.deterministic
    return backends.choose_compiler_options(
        config.backend.compiler_options,
        platform=machine.platform,
        device=mesh.devices.flat[0],
        layer_bytes=4 * matrices_per_layer(config.model) / mesh.shape["tensor"],
        deterministic=deterministic,
    )


def float8_warnings(config: RunConfig, device_kind: str) -> list[str]:
    """Return a warning where train.dtype=float8 is used on devices without 8-bit products."""
    if config.train.dtype != "float8" or backends.multiplies_float8(device_kind):
        return []
    return [
        f"train.dtype=float8: {device_kind!r} is not known to multiply in 8 bits, so "
        "values are only rounded to them and multiplied in bfloat16: slower than bfloat16, for "
        "trying out what float8 does to a loss"
    ]
