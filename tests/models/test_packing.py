"""Packed documents through the model: each is computed as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import COMPUTE, draw_llama, tiny_model
from workdirs import prepare_texts

from llamajax.config.schema import DataConfig
from llamajax.data.batches import make_batch
from llamajax.data.mixture import Sample, open_mixture
from llamajax.data.packing import WINDOWS
from llamajax.models.llama import Compute, Llama

BOS, T = 256, 24
TOLERANCE = 1e-5  # largest difference over largest value
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["xla", "blocked"])
# A low theta, so that all pairs turn within a sample.
MODEL = tiny_model(vocab_size=258, rope_theta=100.0, tie_embeddings=True, init_std=0.5)
# Twelve tokens in three documents. All differ, so that the gradient of an embedding row is that of
# one position.
TOKENS = np.arange(12, dtype=np.int32)[None] + 1
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 3], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]], np.int32)


def compute(impl: str, remat: str = "none") -> Compute:
    return Compute(dtype=COMPUTE.dtype, remat=remat, attention=impl, loss_chunk_tokens=64)


def influence(impl: str, **batch: np.ndarray) -> np.ndarray:
    """Largest absolute derivative (T, S) of the last hidden state at t by the token at s."""
    batch = jax.tree.map(jnp.asarray, {"tokens": TOKENS} | batch)
    # A direction in which no two components are equal: the norm kills the sum of all.
    direction = jnp.arange(1.0, MODEL.hidden_size + 1, dtype=jnp.float32)

    def outputs(weights: Llama) -> jax.Array:
        return weights.hidden_states(batch, compute(impl, "full"))[0] @ direction

    gradients = jax.jit(jax.jacrev(outputs))(Llama(MODEL, jax.random.key(0))).embedding[...]
    return np.abs(np.asarray(gradients)).max(axis=2)[:, TOKENS[0]]


@IMPLEMENTATIONS
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_depends_on_its_past_in_its_own_document_alone(impl, packed):
    seen = np.tril(np.ones((12, 12), bool))
    if packed:
        found = influence(impl, positions=POSITIONS, segment_ids=SEGMENTS)
        seen &= SEGMENTS.T == SEGMENTS
    else:
        found = influence(impl, positions=np.arange(12, dtype=np.int32)[None])
    assert np.all(found[~seen] == 0.0)
    assert np.all(found[seen] > 0.0)


def test_positions_count_by_their_differences_in_a_document():
    batch = {"tokens": TOKENS, "segment_ids": SEGMENTS}
    run = jax.jit(Llama.logits, static_argnums=2)

    def logits(positions: np.ndarray) -> np.ndarray:
        return np.asarray(run(draw_llama(MODEL), batch | {"positions": positions}, COMPUTE))

    found = logits(POSITIONS)
    scale = np.abs(found).max()
    later = logits(np.arange(12, dtype=np.int32)[None])  # the same documents, beginning later
    assert np.abs(later - found).max() <= 1e-4 * scale
    assert np.abs(logits(2 * POSITIONS) - found).max() > 1e-3


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> dict[str, np.ndarray]:
    """Four samples of documents of 3 to 21 tokens, some cut by the end of a sample, and padding."""
    texts = ["abcdefghijklmnopqrs"[: (7 * i) % 19 + 1] for i in range(8)]
    path = prepare_texts(tmp_path_factory.mktemp("packed"), texts, held_out=0)
    data = DataConfig(path=str(path), seq_len=T, global_batch_size=4, seed=0)
    (source,) = open_mixture(data, split="train", vocab_size=258).sources
    windows = source.samples(T, WINDOWS)
    count = windows.count_all
    samples = [Sample(source, n, windows.pieces(n)) for n in range(count)]
    found = make_batch([*samples, None], T, mask_documents=True)
    assert 0 < (found["segment_ids"][count - 1] == 0).sum() < T, "the last sample is part padding"
    assert found["segment_ids"].max() > 2
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def pieces(batch) -> list[tuple[int, np.ndarray]]:
    """(row, columns) of each document, or part of one, in the rows."""
    ids = batch["segment_ids"]
    rows = range(len(ids))
    return [(r, np.flatnonzero(ids[r] == i)) for r in rows for i in range(1, ids[r].max() + 1)]


def alone(batch) -> dict[str, np.ndarray]:
    """The same pieces, a row each, from position 0, with nothing before or behind that matters."""
    found = {name: np.zeros((len(pieces(batch)), T), value.dtype) for name, value in batch.items()}
    found["positions"][:] = np.arange(T)
    del found["segment_ids"]
    for n, (row, columns) in enumerate(pieces(batch)):
        for name in ("tokens", "targets"):
            found[name][n, : len(columns)] = batch[name][row, columns]
        # The last token of a document predicts nothing: behind it another one begins.
        goes_on = batch["targets"][row, columns[-1]] != BOS
        found["loss_mask"][n, : len(columns) - (not goes_on)] = True
    return found


@IMPLEMENTATIONS
def test_packed_documents_are_as_each_alone(batch, impl):
    run = jax.jit(lambda w, b: (w.logits(b, compute(impl)), w.loss_terms(b, compute(impl)).nll))
    weights = draw_llama(MODEL, std=0.5)
    packed, packed_nll = run(weights, batch)
    single, single_nll = run(weights, alone(batch))
    packed, single = np.asarray(packed), np.asarray(single)
    for n, (row, columns) in enumerate(pieces(batch)):
        error = np.abs(packed[row, columns] - single[n, : len(columns)]).max()
        assert error <= TOLERANCE * np.abs(single).max(), (row, columns)
    assert float(packed_nll) == pytest.approx(float(single_nll), rel=TOLERANCE)
    assert batch["loss_mask"].sum() == alone(batch)["loss_mask"].sum() > 3 * T


def test_positions_begin_anew_with_every_document(batch):
    """Logits cannot show it: rotary attention sees differences of positions alone."""
    for row, columns in pieces(batch):
        np.testing.assert_array_equal(batch["positions"][row, columns], np.arange(len(columns)))
        is_start = batch["tokens"][row, columns] == BOS
        assert not is_start[1:].any()
        assert is_start[0] or columns[0] == 0, "only a sample begins inside a document"
