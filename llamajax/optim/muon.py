"""Muon: momentum whose matrices are made orthogonal (Jordan 2024, github.com/KellerJordan/Muon).

Newton-Schulz needs whole matrices, which no device has. Each device gets those of a part of the
layers instead, by one exchange along each axis that splits a matrix, and sends their updates back.
Stages keep their own layers. docs/optimizers.md says what this costs.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llamajax.sharding import WEIGHTS, axes_of, is_stacked, letters, map_weights, spec
from llamajax.sharding.collectives import all_gather, all_to_all, axis_index, axis_size

# Root mean square of an update; AdamW's is 0.2 to 0.4, so that its learning rate and weight decay
# carry over (Liu et al. 2025, arXiv:2502.16982, section 2.2).
_UPDATE_RMS = 0.2
_ITERATIONS = 5  # optax's default, and Jordan's


class MuonState(NamedTuple):
    """The number of updates, and the momentum of every matrix."""

    count: jax.Array  # int32 scalar
    mu: Any


class Exchange(NamedTuple):
    """An exchange along one mesh axis, on the way from parts of matrices to whole ones.

    dim: of the stack, which the axis splits; None: devices along it hold the same. layers, share:
    in the stack before and after.
    """

    axis: str
    dim: int | None
    layers: int
    share: int


def is_muon_matrix(weight: nnx.Variable) -> bool:
    """Return whether Muon updates a weight: matrices of layers, no embedding, head or norm."""
    return len(weight.axes) > 1 and "V" not in weight.axes


def num_inputs(axes: str) -> int:
    """Return how many leading dims of a matrix are its inputs: heads (N or K, H) are one side."""
    return len(axes) - 1 if axes[0] in "NK" else 1


def exchanges(axes: str, layers: int, sizes: Mapping[str, int]) -> list[Exchange]:
    """Return how devices share the Newton-Schulz iterations of `layers` matrices of dims `axes`.

    An axis that splits the matrices exchanges parts of them for whole layers. One along which
    devices hold the same divides the layers among them, as long as there is more than one.
    sizes: of the mesh's axes.
    """

    def dim(axis: str) -> int | None:
        found = [n for n, d in enumerate(axes, 1) if axis in axes_of(WEIGHTS.get(d))]
        return found[0] if found else None

    steps = []
    for axis in sorted(("tensor", "fsdp", "sequence", "data"), key=lambda a: dim(a) is None):
        if sizes[axis] > 1 and (dim(axis) is not None or layers > 1):
            share = -(-layers // sizes[axis])
            steps.append(Exchange(axis, dim(axis), layers, share))
            layers = share
    return steps


def newton_schulz_flops(inputs: int, outputs: int) -> float:
    """Return the FLOPs of making one matrix orthogonal; the short side is multiplied with itself.

    Three products an iteration: X X^T, its square, and that times X.
    """
    short, long = sorted((inputs, outputs))
    return _ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)


def scale_by_muon(beta: float, *, dtype: str) -> optax.GradientTransformation:
    """Replace gradients of matrices by orthogonal updates with an RMS of 0.2.

    Nesterov momentum as in `optax.contrib.muon`, whose Newton-Schulz iteration runs here, in
    `dtype`; float32 is exact.
    """

    def init(weights: Any) -> MuonState:
        return MuonState(jnp.int32(0), optax.tree.zeros_like(weights))

    def update(grads: Any, state: MuonState, weights: Any = None) -> tuple[Any, MuonState]:
        del weights
        count = state.count + 1
        mu = optax.tree.update_moment(grads, state.mu, beta, 1)
        ahead = optax.tree.bias_correction(mu, beta, count + 1)
        here = optax.tree.bias_correction(grads, beta, count)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, here)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            updates = map_weights(lambda w: _orthogonal(w, jnp.dtype(dtype)), nesterov)
        return updates, MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def _orthogonal(weight: nnx.Variable, dtype: jnp.dtype) -> nnx.Variable:
    """Return the scaled orthogonal update of a matrix, or of each of a stack of matrices."""
    value, axes = weight.get_value(), weight.axes
    run = _on_whole_matrices(axes, is_stacked(weight))
    mesh = jax.typeof(value).sharding.mesh
    if not mesh.empty:
        where = spec(letters(weight), WEIGHTS, mesh)
        run = jax.shard_map(run, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)
    # The RMS of an orthogonal matrix is 1 / sqrt(longer side).
    inputs, first = num_inputs(axes), value.ndim - len(axes)
    sides = math.prod(value.shape[first:][:inputs]), math.prod(value.shape[first:][inputs:])
    scale = _UPDATE_RMS * math.sqrt(max(sides))
    return weight.replace(scale * run(value.astype(dtype)).astype(jnp.float32))


def _on_whole_matrices(axes: str, stacked: bool) -> Callable[[jax.Array], jax.Array]:
    """Return the function from a device's part of a stack to its part of orthogonal matrices."""
    inputs = num_inputs(axes)
    dims = optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, len(axes))))
    # Without momentum, its update is the Newton-Schulz iteration alone.
    newton_schulz = optax.contrib.scale_by_muon(
        ns_steps=_ITERATIONS, beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )

    def one(matrix: jax.Array) -> jax.Array:
        return newton_schulz.update(matrix, newton_schulz.init(matrix))[0]

    def run(stack: jax.Array) -> jax.Array:
        stack = stack if stacked else stack[None]
        sizes = {axis: axis_size(axis) for axis in ("tensor", "fsdp", "sequence", "data")}
        steps = exchanges(axes, stack.shape[0], sizes)
        for step in steps:
            stack = _share(stack, step)
        stack = jax.lax.map(one, stack)
        for step in reversed(steps):
            stack = _give_back(stack, step)
        return stack if stacked else stack[0]

    return run


def _share(stack: jax.Array, step: Exchange) -> jax.Array:
    """Return this device's share of the layers, whole along the axis of `step`."""
    added = step.share * axis_size(step.axis) - step.layers
    stack = jnp.pad(stack, [(0, added), *[(0, 0)] * (stack.ndim - 1)])
    if step.dim is None:
        start = axis_index(step.axis) * step.share
        return jax.lax.dynamic_slice_in_dim(stack, start, step.share)
    return all_to_all(stack, step.axis, split=0, join=step.dim)


def _give_back(stack: jax.Array, step: Exchange) -> jax.Array:
    """Invert `_share`."""
    if step.dim is None:
        return all_gather(stack, step.axis, dim=0)[: step.layers]
    return all_to_all(stack, step.axis, split=step.dim, join=0)[: step.layers]
