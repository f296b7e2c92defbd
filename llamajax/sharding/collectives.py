"""Communication inside the manually sharded step, with its derivatives.

The step runs in one `jax.shard_map` over all mesh axes: arrays are one device's part and every
collective is visible. These are the whole communication of the model:

- `gather`: a stored weight -> the weight as it is used (FSDP). Backward, the gradient is reduced
  and scattered in float32. A plain cast-then-gather would transpose to a reduction in bfloat16, and
  float32 accumulators would then sum rounded values.
- `enter_tensor` / `leave_tensor`: around a pair of matrices split over `tensor`. With split tokens
  (training) all tokens are gathered before the pair, and the sum of the partial products is
  scattered over tokens after it (sequence parallelism, arXiv:2205.05198). Without, `copy_to_tensor`
  and its counterpart: identity forward and sum backward, and the reverse (Megatron-LM's f and g,
  arXiv:1909.08053).
- `ppermute`: an activation from one pipeline stage to the next.
- `psum_tree`: gradients of weights that several devices hold.

Derivatives are written by hand so that they are the same with and without JAX's check of varying
axes, which some fused kernels cannot pass. Where an axis splits nothing (one device, or outside
`shard_map`) these return their input (`gather` still casts), so a model also runs on one device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from llamajax.sharding.axes import WEIGHTS, axes_of, is_stacked, map_weights
from llamajax.sharding.float8 import Float8Weight


def is_split(axis: str) -> bool:
    """Return whether arrays here are parts along `axis`: in `shard_map`, over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


def axis_size(axis: str) -> int:
    """Return the number of devices along `axis`; 1 outside `shard_map`."""
    return jax.lax.axis_size(axis) if is_split(axis) else 1


def axis_index(axis: str) -> jax.Array:
    """Return this device's position along `axis`, int32 scalar; 0 where nothing is split."""
    return jax.lax.axis_index(axis) if is_split(axis) else jnp.int32(0)


def psum(x: Any, axis: str | tuple[str, ...]) -> Any:
    """Sum a tree over one or several mesh axes."""
    split = tuple(a for a in axes_of(axis) if is_split(a))
    return jax.lax.psum(x, split) if split else x


def pmax(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """Return the maximum over one or several mesh axes; not differentiable."""
    split = tuple(a for a in axes_of(axis) if is_split(a))
    return jax.lax.pmax(pcast_varying(x, split), split) if split else x


def all_gather(x: jax.Array, axis: str, *, dim: int) -> jax.Array:
    """Join the parts along `axis` along array dimension `dim`."""
    if not is_split(axis):
        return x
    ones = _ones_before(x, dim)
    whole = jax.lax.all_gather(jnp.squeeze(x, ones), axis, axis=dim - len(ones), tiled=True)
    return jnp.expand_dims(whole, ones)


def psum_scatter(x: jax.Array, axis: str, *, dim: int) -> jax.Array:
    """Sum over `axis`; each device keeps its part of array dimension `dim`."""
    if not is_split(axis):
        return x
    ones = _ones_before(x, dim)
    flat, flat_dim = jnp.squeeze(x, ones), dim - len(ones)
    part = jax.lax.psum_scatter(flat, axis, scatter_dimension=flat_dim, tiled=True)
    return jnp.expand_dims(part, ones)


def _ones_before(x: jax.Array, dim: int) -> tuple[int, ...]:
    """Return the dimensions of size 1 before `dim`, which a gather or scatter squeezes out.

    Behind one, XLA's TPU compiler (libtpu 0.0.42) makes the scatter an all-reduce, of twice the
    traffic. A microbatch of one sample has one, and a gather's derivative is a scatter.
    """
    return tuple(i for i in range(dim) if x.shape[i] == 1)


def all_to_all(x: jax.Array, axis: str, *, split: int, join: int) -> jax.Array:
    """Send each device along `axis` its part of dim `split`; join what arrives along dim `join`."""
    if not is_split(axis):
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=join, tiled=True)


def ppermute(x: jax.Array, axis: str, *, by: int) -> jax.Array:
    """Send `x` to the device `by` places further, in a ring along `axis`."""
    if not is_split(axis):
        return x
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + by) % size) for i in range(size)])


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the mesh axes along which `x` may differ; none outside `shard_map` or unchecked."""
    return jax.typeof(x).manual_axis_type.varying


def pcast_varying(tree: Any, axis: str | tuple[str, ...]) -> Any:
    """Mark values as possibly different along `axis`; no communication."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes_of(axis) if is_split(a) and a not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def pcast_varying_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Mark `x` as varying wherever one of `others` varies (for scan carries)."""
    return pcast_varying(x, tuple({a for other in others for a in varying_axes(other)}))


def _copy_axes(weight: nnx.Variable) -> tuple[str, ...]:
    """Return the axes along which devices hold the same part of a weight and see other tokens."""
    return ("data", "sequence") if is_stacked(weight) else ("data", "sequence", "stage")


def pcast_varying_tree(tree: Any) -> Any:
    """Mark weights as used differently by each device that holds a copy."""
    return map_weights(lambda w: w.replace(pcast_varying(w.get_value(), _copy_axes(w))), tree)


def psum_tree(grads: Any) -> Any:
    """Sum gradients of weights of `pcast_varying_tree` over the devices that hold a copy."""
    return map_weights(lambda g: g.replace(psum(g.get_value(), _copy_axes(g))), grads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(x: jax.Array, scale: Any, dim: int | None, dtype: jnp.dtype) -> jax.Array:
    if scale is not None:
        x = x * jnp.expand_dims(scale, range(scale.ndim, x.ndim))
    x = x.astype(dtype)
    whole = pcast_varying(x, "fsdp") if dim is None else all_gather(x, "fsdp", dim=dim)
    return checkpoint_name(whole.astype(jnp.float32), "gathered_weight")


def _gather_backward(dim: int | None, dtype: jnp.dtype, _: None, grad: jax.Array):
    return psum(grad, "fsdp") if dim is None else psum_scatter(grad, "fsdp", dim=dim), None


_gather.defvjp(lambda *arguments: (_gather(*arguments), None), _gather_backward)


def gather(tree: Any, dtype: jnp.dtype, *, split_tokens: bool = False) -> Any:
    """Round stored weights to `dtype` and join their parts along `fsdp`; float32 arrays.

    The parts travel in `dtype`. The result has its values in float32, so that JAX gives it a
    float32 gradient; `linear` casts it back, and XLA leaves out the two casts.
    A remat policy finds the name "gathered_weight" inside the derivative, where the result and all
    that leads to it are one, and can refuse to keep them until the backward pass.
    """

    def gather_one(weight: nnx.Variable) -> nnx.Variable:
        value = weight.get_value()
        ndim = jax.tree.leaves(value)[0].ndim
        assert ndim == len(weight.axes), "gather inside the scan over layers, not outside"
        value = cast_and_gather(value, weight.axes, dtype, split_tokens=split_tokens)
        return weight.replace(value)

    return map_weights(gather_one, tree)


def cast_and_gather(
    value: jax.Array | Float8Weight, axes: str, dtype: jnp.dtype, *, split_tokens: bool
) -> Any:
    """`gather` of one weight of dims `axes`, or of a stack of such, float32.

    Vectors (norm scales) stay float32: rounding 1.003 to bfloat16 would lose it. A matrix with a
    scale travels in 8 bits. The gradient that comes back is that of the matrix, without the scale.
    """
    if isinstance(value, Float8Weight):
        stored = _as_stored(value.value)
        if value.scale is None:
            whole = cast_and_gather(stored, axes, dtype, split_tokens=split_tokens)
        else:
            whole = _gather(stored, value.scale, fsdp_dim(stored, axes), jnp.float8_e4m3fn)
        return dataclasses.replace(value, value=whole)
    if grad_sums_over_tensor(axes, split_tokens=split_tokens):
        value = copy_to_tensor(value)
    return _gather(value, None, fsdp_dim(value, axes), jnp.float32 if len(axes) == 1 else dtype)


@jax.custom_vjp
def _as_stored(x: jax.Array) -> jax.Array:
    """Return `x`, with the order of its dims in memory fixed: the last one runs fastest.

    A GPU multiplies in 8 bits what lies transposed in memory. Left to itself, XLA transposes what
    it can find first, the whole stack of layers before the loop over them: a second copy in
    float32. So each layer is transposed where it is rounded.
    """
    return _row_major(x)


@jax.jit  # JAX fixes the layout of a value outside a compiled program in another way
def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


_as_stored.defvjp(lambda x: (_as_stored(x), None), lambda _, grad: (grad,))


def grad_sums_over_tensor(axes: str, *, split_tokens: bool) -> bool:
    """Return whether a weight of dims `axes` is whole along `tensor` and multiplies other values.

    So does a factor of an adapter in the middle of a pair of split matrices, where no
    `enter_tensor` is; and a norm scale, where devices along `tensor` have other tokens.
    """
    on_tensor = any("tensor" in axes_of(WEIGHTS.get(d)) for d in axes)
    return not on_tensor and ("R" in axes or split_tokens)


def fsdp_dim(value: jax.Array, axes: str) -> int | None:
    """Return a (stacked) weight's dimension split over `fsdp`; None for some adapter factors."""
    dims = [i for i, d in enumerate(axes) if "fsdp" in axes_of(WEIGHTS.get(d))]
    assert len(dims) == 1 or "R" in axes, f"a weight is split over fsdp: {axes}"
    return dims[0] + value.ndim - len(axes) if dims else None


@jax.custom_vjp
def copy_to_tensor(x: jax.Array) -> jax.Array:
    """Use `x`, equal along `tensor`, differently on each device: its gradient is the sum."""
    return pcast_varying(x, "tensor")


copy_to_tensor.defvjp(lambda x: (copy_to_tensor(x), None), lambda _, grad: (psum(grad, "tensor"),))


@jax.custom_vjp
def _reduce_from_tensor(x: jax.Array) -> jax.Array:
    return psum(x, "tensor")


_reduce_from_tensor.defvjp(
    lambda x: (_reduce_from_tensor(x), None), lambda _, grad: (pcast_varying(grad, "tensor"),)
)


def enter_tensor(x_BTD: jax.Array, *, split_tokens: bool) -> jax.Array:
    """Prepare an activation for a matrix whose outputs are split over `tensor`: all its tokens."""
    return all_gather(x_BTD, "tensor", dim=1) if split_tokens else copy_to_tensor(x_BTD)


def leave_tensor(x_BTD: jax.Array, *, split_tokens: bool) -> jax.Array:
    """Sum partial products with a matrix whose inputs are split over `tensor`."""
    return psum_scatter(x_BTD, "tensor", dim=1) if split_tokens else _reduce_from_tensor(x_BTD)
