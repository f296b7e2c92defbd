"""Probes of one step on the devices: its gradient, bit by bit, and its forward pass by layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from llamajax.checkpoint import named_leaves
from llamajax.models.llama import Batch, Block, Compute, LayerInputs, Llama
from llamajax.models.sharded_step import by_documents, sharded_step
from llamajax.sharding import ACTIVATIONS, batch_spec, spec
from llamajax.sharding.collectives import pcast_varying, psum
from llamajax.training.setup import Setup
from llamajax.training.state import TrainState
from llamajax.training.step import mean_gradient

# Of one layer, in the order in which they are computed.
IN_A_LAYER = ("input", "query", "key", "value", "attention output", "output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSummary:
    """The result of one computation of a step's gradient.

    bits: by weight, the sum modulo 2**32 of the gradient's float32 words, which is the same in any
    order of adding. nonfinite: by weight, how many values of each row of its first dimension (for
    stacked weights: of each layer) are not finite.
    """

    loss: float
    grad_norm: float
    bits: Mapping[str, int]
    nonfinite: Mapping[str, np.ndarray]


def gradient_probe(setup: Setup, state: TrainState, batch: Batch) -> Callable[[], GradientSummary]:
    """Compile a function that computes the gradient of a step each time it is called."""
    gradient = mean_gradient(setup.config.train, setup.compute, setup.mesh)

    def probe(state: TrainState, batch: Batch) -> Any:
        grads, (loss, *_) = gradient(state, batch)
        leaves = named_leaves(grads)
        words = {n: jax.lax.bitcast_convert_type(g, jnp.uint32) for n, g in leaves.items()}
        bits = {name: jnp.sum(word, dtype=jnp.uint32) for name, word in words.items()}
        return loss, optax.tree.norm(grads), bits, _nonfinite_rows(leaves)

    compiled = setup.compiler_options.compile(jax.jit(probe).lower(state, batch))

    def run() -> GradientSummary:
        loss, norm, bits, odd = jax.device_get(compiled(state, batch))
        counts = {name: int(value) for name, value in bits.items()}
        return GradientSummary(loss=float(loss), grad_norm=float(norm), bits=counts, nonfinite=odd)

    return run


def nonfinite_weights(state: TrainState) -> dict[str, np.ndarray]:
    """Count the values that are not finite, by row (or layer), of each weight that has some."""
    found = jax.device_get(jax.jit(lambda s: _nonfinite_rows(named_leaves(s.whole)))(state))
    return {name: rows for name, rows in found.items() if rows.any()}


def _nonfinite_rows(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _nonfinite_by_row(leaf) for name, leaf in leaves.items()}


def nonfinite_probe(compute: Compute, mesh: Mesh) -> Callable[[Llama, Batch], Any]:
    """Count the values that are not finite on the way through the model, by row of a batch; jitted.

    Returns (L, 6, B) for IN_A_LAYER, and (B,) for the last hidden states, without the adapters'
    dropout. Axes `stage` and `sequence` of the mesh have size 1.
    """
    compute = dataclasses.replace(compute, remat="none", split_tokens=False)
    rows = spec("B", ACTIVATIONS, mesh)
    outputs = (PartitionSpec(None, None, *rows), rows)

    def visit(block: Block, x_BTD: jax.Array, carry: None, inputs: LayerInputs):
        def attend(q_BTNH, k_BTKH, v_BTKH):
            o_BTNH, _ = inputs.attend(q_BTNH, k_BTKH, v_BTKH)
            heads = [_nonfinite_by_row(a) for a in (q_BTNH, k_BTKH, v_BTKH, o_BTNH)]
            return o_BTNH, psum(pcast_varying(jnp.stack(heads), "tensor"), "tensor")

        y_BTD, heads_4B = block(x_BTD, inputs, attend)
        ends = [_nonfinite_by_row(a)[None] for a in (x_BTD, y_BTD)]
        return y_BTD, carry, jnp.concatenate([ends[0], heads_4B, ends[1]])

    def local(model: Llama, batch: Batch) -> Any:
        def run(compute: Compute) -> Any:
            x_BTD, _, layers_L6B = pcast_varying(model, "data").forward(batch, compute, visit)
            return layers_L6B, _nonfinite_by_row(x_BTD)

        return by_documents(run, batch, compute)

    def probe(model: Llama, batch: Batch) -> Any:
        return sharded_step(local, mesh, model, (batch_spec(mesh),), outputs, compute)(model, batch)

    return jax.jit(probe)


def _nonfinite_by_row(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), axis=range(1, x.ndim), dtype=jnp.int32)
