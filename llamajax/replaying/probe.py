"""One step taken apart on the devices: its gradient, bit by bit, and its forward pass by layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from llamajax.checkpoint import named_leaves
from llamajax.models.llama import Batch, Compute, Llama
from llamajax.models.sharded import precision, sharded
from llamajax.ops.attention import attention
from llamajax.ops.embedding import embed
from llamajax.ops.norm import rms_norm
from llamajax.ops.rope import angles, frequencies
from llamajax.sharding import ACTIVATIONS, spec
from llamajax.sharding.collectives import gather, total, varying
from llamajax.training.session import Session
from llamajax.training.state import TrainState
from llamajax.training.step import mean_gradient

# Of one layer, in the order in which they are computed.
IN_A_LAYER = ("query", "key", "value", "attention output", "output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What one computation of a step's gradient gave.

    bits: by weight, the sum modulo 2**32 of the gradient's float32 words, which is the same in any
    order of adding. nonfinite: by weight, how many values of each row of its first dimension (for
    stacked weights: of each layer) are not finite.
    """

    loss: float
    grad_norm: float
    bits: Mapping[str, int]
    nonfinite: Mapping[str, np.ndarray]


def prober(session: Session, state: TrainState, batch: Batch) -> Callable[[], Probe]:
    """What computes the gradient of a step once more each time it is called; changes nothing."""
    gradient = mean_gradient(session.config.train, session.compute, session.mesh)

    def probe(state: TrainState, batch: Batch) -> Any:
        grads, (loss, _, _) = gradient(state, batch)
        leaves = named_leaves(grads)
        words = {n: jax.lax.bitcast_convert_type(g, jnp.uint32) for n, g in leaves.items()}
        bits = {name: jnp.sum(word, dtype=jnp.uint32) for name, word in words.items()}
        return loss, optax.tree.norm(grads), bits, _odd_rows(leaves)

    compiled = jax.jit(probe).lower(state, batch).compile()

    def run() -> Probe:
        loss, norm, bits, odd = jax.device_get(compiled(state, batch))
        counts = {name: int(value) for name, value in bits.items()}
        return Probe(loss=float(loss), grad_norm=float(norm), bits=counts, nonfinite=odd)

    return run


def nonfinite_weights(state: TrainState) -> dict[str, np.ndarray]:
    """By name, the weights with values that are not finite: how many in each row (or layer)."""
    found = jax.device_get(jax.jit(lambda s: _odd_rows(named_leaves(s.whole)))(state))
    return {name: rows for name, rows in found.items() if rows.any()}


def _odd_rows(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    count = lambda x: jnp.sum(~jnp.isfinite(x), axis=range(1, x.ndim), dtype=jnp.int32)  # noqa: E731
    return {name: count(leaf) for name, leaf in leaves.items()}


def can_walk(mesh: Mesh) -> bool:
    """Whether `walker` works on this mesh: layers and tokens are whole on every device."""
    return mesh.shape["stage"] == mesh.shape["sequence"] == 1


def walker(compute: Compute, mesh: Mesh) -> Callable[[Llama, Batch], Any]:
    """Values that are not finite, by row of a batch, on the way through the model; jitted.

    (B,) for the embedded tokens, (L, 5, B) for what IN_A_LAYER names, (B,) for the last hidden
    states. The adapters' dropout does not happen.
    """
    compute = dataclasses.replace(compute, remat="none", split_tokens=False)
    out = (spec("B", ACTIVATIONS, mesh), PartitionSpec(None, None, *spec("B", ACTIVATIONS, mesh)))

    def local(model: Llama, batch: Batch) -> Any:
        with precision(compute):
            return _walk(varying(model, "data"), batch, compute)

    def walk(model: Llama, batch: Batch) -> Any:
        return sharded(local, mesh, model, (*out, out[0]), compute)(model, batch)

    return jax.jit(walk)


def _walk(model: Llama, batch: Batch, compute: Compute) -> Any:
    c = model.config
    x_BTD = embed(model.embedding[...], batch["tokens"], compute.dtype, False)
    frequency = frequencies(c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
    cos_sin = angles(batch["positions"], frequency)

    def block(x_BTD: jax.Array, layer: Any) -> Any:
        seen: list[jax.Array] = []  # filled while this function is traced

        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Any:
            segments = batch.get("segment_ids")
            o_BTNH = attention(
                q_BTNH, k_BTKH, v_BTKH, impl=compute.attention, segment_ids_BT=segments
            )
            seen.extend(_odd(x) for x in (q_BTNH, k_BTKH, v_BTKH, o_BTNH))
            return o_BTNH, None

        layer = gather(layer, compute.dtype)
        x_BTD, _ = layer(x_BTD, cos_sin, attend, None, eps=c.norm_eps, split=False)
        heads_4B = total(varying(jnp.stack(seen), "tensor"), "tensor")
        return x_BTD, jnp.concatenate([heads_4B, _odd(x_BTD)[None]])

    embedded_B = _odd(x_BTD)
    x_BTD, layers_L5B = jax.lax.scan(block, x_BTD, model.blocks)
    norm = gather(model.norm, compute.dtype)
    return embedded_B, layers_L5B, _odd(rms_norm(x_BTD, norm[...], eps=c.norm_eps))


def _odd(x_BT: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x_BT), axis=range(1, x_BT.ndim), dtype=jnp.int32)
