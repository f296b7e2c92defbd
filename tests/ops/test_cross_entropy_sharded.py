"""The cross-entropy inside `shard_map`, on every way to split it, against float64 NumPy."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.ops.cross_entropy import cross_entropy, token_nll
from llamajax.sharding import ACTIVATIONS, BATCH_AXES, WEIGHTS
from llamajax.sharding.collectives import pcast_varying, psum

# 300 tokens are stored in 384 rows: neither a multiple of 128 x 2, and one part is half padding.
B, T, D, VOCAB, ROWS = 8, 5, 6, 300, 384
TOLERANCE = 1e-5  # largest difference over largest value: float32 against float64
WHOLE = {"data": 2, "fsdp": 2, "tensor": 2}
# With tokens a chunk: of the 10, 20 or 40 local ones no multiple, but for 512, which is all.
SPLITS = [({"fsdp": 2}, 7), ({"tensor": 2}, 3), ({"fsdp": 2, "tensor": 2}, 512), (WHOLE, 3)]


def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(ROWS, D)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    targets[0, :3] = 0, 191, VOCAB - 1  # the edges of the parts
    mask = rng.random((B, T)) < 0.6
    mask[1] = False
    return x, head, targets, mask


@functools.cache
def reference(z_weight: float):
    """(nll, z, gradient by x, gradient by the head, nll of each token), in float64."""
    x, head, targets, mask = inputs()
    x, head = x.reshape(-1, D).astype(np.float64), head.astype(np.float64)
    targets, mask = targets.reshape(-1), mask.reshape(-1).astype(np.float64)
    odds = np.exp(x @ head[:VOCAB].T)
    partition = odds.sum(axis=1)
    log_partition = np.log(partition)
    nll = log_partition - np.sum(x * head[targets], axis=1)
    grad = odds / partition[:, None] * (1 + 2 * z_weight * log_partition)[:, None]
    grad = (grad - np.eye(VOCAB)[targets]) * mask[:, None]
    grad_head = np.zeros_like(head)
    grad_head[:VOCAB] = grad.T @ x
    grad_x = (grad @ head[:VOCAB]).reshape(B, T, D)
    return nll @ mask, log_partition**2 @ mask, grad_x, grad_head, nll.reshape(B, T)


def on_mesh(shape: dict[str, int], function, out: str, *, check_vma: bool = True):
    """`function(x, head, targets, mask)` on every device's part; `out` names dims, `""` a sum."""
    count = np.prod(list(shape.values()), dtype=int)
    mesh = sharding.build_mesh(MeshConfig(**shape), jax.devices()[:count])
    spec = functools.partial(sharding.spec, mesh=mesh)
    specs = {"": PartitionSpec(), "BTD": spec("BTD", ACTIVATIONS), "BT": spec("BT", ACTIVATIONS)}
    specs["VD"] = spec("VD", WEIGHTS)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs[name] for name in ("BTD", "VD", "BT", "BT")),
        out_specs=tuple(specs[name] for name in out.split(",")),
        check_vma=check_vma,
    )
    placed = [
        jax.device_put(array, NamedSharding(mesh, specs[name]))
        for array, name in zip(inputs(), ("BTD", "VD", "BT", "BT"), strict=True)
    ]
    return [np.asarray(array) for array in jax.jit(run)(*placed)]


def gradients(x, head, targets, mask, *, chunk: int, z_weight: float):
    """What the training step does around the loss: the sums, and what it reduces."""

    def objective(x, head):
        options = {"vocab_size": VOCAB, "chunk_tokens": chunk, "z_weight": z_weight}
        terms = cross_entropy(x, head, targets, mask, **options)
        return terms.objective, terms

    run = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (_, terms), (grad_x, grad_head) = run(x, pcast_varying(head, "data"))
    return *psum(tuple(terms), BATCH_AXES), grad_x, psum(grad_head, "data")


def assert_equal(found, *, z_weight: float):
    objective, nll, z, grad_x, grad_head = found
    expected_nll, expected_z, expected_x, expected_head, _ = reference(z_weight)
    np.testing.assert_allclose(nll, expected_nll, rtol=TOLERANCE)
    np.testing.assert_allclose(z, expected_z, rtol=TOLERANCE)
    np.testing.assert_allclose(objective, expected_nll + z_weight * expected_z, rtol=TOLERANCE)
    for got, want in ((grad_x, expected_x), (grad_head, expected_head)):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert not grad_head[VOCAB:].any(), "padding has no gradient"
    assert not grad_x[~inputs()[3]].any(), "nor have tokens that do not count"


@pytest.mark.parametrize(("shape", "chunk"), SPLITS, ids=str)
def test_value_and_gradient_equal_float64(shape, chunk):
    step = functools.partial(gradients, chunk=chunk, z_weight=0.3)
    assert_equal(on_mesh(shape, step, ",,,BTD,VD"), z_weight=0.3)


def test_the_same_without_the_check_of_varying_axes():
    step = functools.partial(gradients, chunk=7, z_weight=0.0)
    assert_equal(on_mesh(WHOLE, step, ",,,BTD,VD", check_vma=False), z_weight=0.0)


@pytest.mark.parametrize(("shape", "chunk"), SPLITS[1:], ids=str)
def test_losses_of_single_tokens_equal_float64(shape, chunk):
    def losses(x, head, targets, mask):
        head = pcast_varying(head, "data")
        return (token_nll(x, head, targets, vocab_size=VOCAB, chunk_tokens=chunk),)

    (found,) = on_mesh(shape, losses, "BT")
    np.testing.assert_allclose(found, reference(0.0)[4], rtol=0, atol=TOLERANCE * 10)
