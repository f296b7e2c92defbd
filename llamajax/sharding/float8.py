"""Matrices that are multiplied in 8 bits, and the options of their products."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8:
    """Which matrices of a layer are multiplied in 8 bits, and how (`train.float8_*`).

    gradients: the dtype of the output gradient in both backward products: e5m2 or e4m3; with
    bfloat16 these products are those of bfloat16 training. scaling: `tensor` for one scale an
    operand, `row` for one a row or column of each product.
    """

    targets: tuple[str, ...]
    gradients: str
    scaling: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Weight:
    """A matrix for products in 8 bits: float32, or a stack of such over layers.

    scale: a power of two for each layer, of the whole matrix on all devices. As stored, `value` is
    the matrix; gathered, it is the matrix times `scale`, rounded to e4m3. None with scales by rows:
    such a matrix is gathered in the compute dtype and quantized for each of its products.
    """

    value: jax.Array
    scale: jax.Array | None
    options: Float8 = dataclasses.field(metadata={"static": True})
