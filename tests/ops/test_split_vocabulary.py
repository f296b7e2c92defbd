"""The table and the head split over vocabulary and width: values and gradients against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import on_mesh

from llamajax.ops.cross_entropy import cross_entropy, token_scores
from llamajax.ops.embedding import embed
from llamajax.sharding import BATCH_AXES
from llamajax.sharding.collectives import pcast_varying, psum

# 300 tokens are stored in 384 rows: neither a multiple of 128 x 2, and one part is half padding.
B, T, D, VOCAB, ROWS = 8, 5, 6, 300, 384
TOLERANCE = 1e-5  # largest difference over largest value: float32 against float64
ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
# With tokens a chunk: of the 10, 20 or 40 local ones no multiple, but for 512, which is all.
SPLITS = [
    ({}, 7), ({}, 512), ({"fsdp": 2}, 7), ({"tensor": 2}, 3), ({"fsdp": 2, "tensor": 2}, 512),
    (ALL_AXES, 3),
]  # fmt: skip


def inputs(vocab: int = VOCAB):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(ROWS, D)).astype(np.float32)
    targets = rng.integers(0, vocab, (B, T)).astype(np.int32)
    targets[0, :3] = 0, 191, vocab - 1  # the edges of the parts
    mask = rng.random((B, T)) < 0.6
    mask[1] = False
    return {"BTD": x, "VD": head, "BT": targets, "BT ": mask}


@functools.cache
def reference(vocab: int, z_weight: float):
    """(nll, z, gradient by x, gradient by the head, nll of each token), in float64."""
    x, head, targets, mask = inputs(vocab).values()
    x, head = x.reshape(-1, D).astype(np.float64), head.astype(np.float64)
    targets, mask = targets.reshape(-1), mask.reshape(-1).astype(np.float64)
    odds = np.exp(x @ head[:vocab].T)
    partition = odds.sum(axis=1)
    log_partition = np.log(partition)
    nll = log_partition - np.sum(x * head[targets], axis=1)
    grad = odds / partition[:, None] * (1 + 2 * z_weight * log_partition)[:, None]
    grad = (grad - np.eye(vocab)[targets]) * mask[:, None]
    grad_head = np.zeros_like(head)
    grad_head[:vocab] = grad.T @ x
    grad_x = (grad @ head[:vocab]).reshape(B, T, D)
    return nll @ mask, log_partition**2 @ mask, grad_x, grad_head, nll.reshape(B, T)


def check(sizes, chunk: int, *, vocab: int = VOCAB, z_weight: float, check_vma: bool = True):
    """Compare the loss with the reference, reduced as the training step does it."""

    def gradients(x, head, targets, mask):
        def objective(x, head):
            options = {"vocab_size": vocab, "chunk_tokens": chunk, "z_weight": z_weight}
            terms = cross_entropy(x, head, targets, mask, **options)
            return terms.objective, terms

        run = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, terms), (grad_x, grad_head) = run(x, pcast_varying(head, "data"))
        return *psum(tuple(terms), BATCH_AXES), grad_x, psum(grad_head, "data")

    arrays = [(name.strip(), array) for name, array in inputs(vocab).items()]
    outputs = ("", "", "", "BTD", "VD")
    found = on_mesh(sizes, gradients, arrays, outputs, check_vma=check_vma)
    objective, nll, z, *grads = found
    expected_nll, expected_z, *expected_grads, _ = reference(vocab, z_weight)
    np.testing.assert_allclose(nll, expected_nll, rtol=TOLERANCE)
    np.testing.assert_allclose(z, expected_z, rtol=TOLERANCE)
    np.testing.assert_allclose(objective, expected_nll + z_weight * expected_z, rtol=TOLERANCE)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert not grads[1][vocab:].any(), "padding has no gradient"
    assert not grads[0][~inputs(vocab)["BT "]].any(), "nor have tokens that do not count"


@pytest.mark.parametrize(("sizes", "chunk"), SPLITS, ids=str)
def test_value_and_gradient_equal_float64(sizes, chunk):
    check(sizes, chunk, z_weight=0.3)


def test_a_head_without_padding_rows():
    check({}, 4, vocab=ROWS, z_weight=0.0)


def test_the_same_without_the_check_of_varying_axes():
    check(ALL_AXES, 7, z_weight=0.0, check_vma=False)


@pytest.mark.parametrize(("sizes", "chunk"), SPLITS[3:], ids=str)
def test_scores_of_single_tokens_equal_float64(sizes, chunk):
    def scores(x, head, targets):
        head = pcast_varying(head, "data")
        return tuple(token_scores(x, head, targets, vocab_size=VOCAB, chunk_tokens=chunk))

    arrays = inputs()
    logits = arrays["BTD"].astype(np.float64) @ arrays["VD"][:VOCAB].T.astype(np.float64)
    expected, probable = reference(VOCAB, 0.0)[4], np.argmax(logits, axis=-1) == arrays["BT"]
    assert not probable.any()
    arrays["BT"][:, 3:] = np.argmax(logits, axis=-1)[:, 3:]
    found, greedy = on_mesh(sizes, scores, list(arrays.items())[:3], ("BT", "BT"))
    np.testing.assert_array_equal(greedy, np.broadcast_to(np.arange(T) >= 3, (B, T)))
    np.testing.assert_allclose(found[:, :3], expected[:, :3], rtol=0, atol=TOLERANCE * 10)


MESHES = [{}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}, ALL_AXES]


def looked_up():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, D)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    tokens[0, :3] = 0, 191, VOCAB - 1  # the edges of the parts
    tokens[:, 4] = 192  # on every device, several times
    return table, tokens, rng.normal(size=(B, T, D)).astype(np.float32)


def embedded(sizes: dict[str, int], table, tokens, grad, dtype: str, *, check_vma: bool = True):
    """Embeddings of all tokens, and the table's gradient where theirs is `grad`."""

    def local(table, tokens, grad):
        table = pcast_varying(table, "data")
        x, backward = jax.vjp(lambda table: embed(table, tokens, jnp.dtype(dtype)), table)
        return x, psum(backward(grad.astype(dtype))[0], "data")

    arrays = (("VD", table), ("BT", tokens), ("BTD", grad))
    return on_mesh(sizes, local, arrays, ("BTD", "VD"), check_vma=check_vma)


@pytest.mark.parametrize(
    ("sizes", "check_vma"), [*((sizes, True) for sizes in MESHES), (ALL_AXES, False)], ids=str
)
def test_the_look_up_and_its_gradient_equal_numpy(sizes, check_vma):
    table, tokens, grad = looked_up()
    x, grad_table = embedded(sizes, table, tokens, grad, "float32", check_vma=check_vma)
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros(table.shape, np.float64)
    np.add.at(expected, tokens, grad.astype(np.float64))
    np.testing.assert_allclose(grad_table, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert not grad_table[VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("sizes", [{}, ALL_AXES], ids=str)
def test_gradients_of_a_frequent_token_are_summed_in_float32(sizes):
    """2,400 times 1/256 in bfloat16 would stop growing at 1."""
    table, tokens = looked_up()[0], np.full((B, 300), 192, np.int32)
    grad = np.full((B, 300, D), 1 / 256, np.float32)
    x, grad_table = embedded(sizes, table, tokens, grad, "bfloat16")
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, table.astype(jnp.bfloat16)[tokens])
    np.testing.assert_allclose(grad_table[192], B * 300 / 256, rtol=1e-6)
