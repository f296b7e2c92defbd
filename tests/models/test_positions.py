"""What `make_batch` says of packed documents, through the model: each is as it is alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import prepare
from llamajax.config.schema import DataConfig, ModelConfig
from llamajax.data.batches import make_batch
from llamajax.data.mixture import open_mixture
from llamajax.models.llama import Compute, Llama

BOS, EOS, T = 256, 257, 24
TOLERANCE = 1e-5  # largest difference over largest value
MODEL = ModelConfig(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    rope_theta=100.0,  # low, so that all pairs turn within a sample
    norm_eps=1e-5,
    tie_embeddings=True,
    init_std=0.5,
    max_seq_len=32,
)


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> dict[str, np.ndarray]:
    """Four samples of documents of 3 to 21 tokens, some cut by the end of a sample, and padding."""
    folder = tmp_path_factory.mktemp("packed")
    texts = ["abcdefghijklmnopqrs"[: (7 * i) % 19 + 1] for i in range(8)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "in.jsonl").write_text(lines)
    args = [f"--input={folder / 'in.jsonl'}", f"--output={folder / 'out'}", "--tokenizer=byte"]
    prepare.main([*args, "--validation_fraction=0", "--workers=1"])
    data = DataConfig(path=str(folder / "out"), seq_len=T, global_batch_size=4, seed=0)
    (source,) = open_mixture(data, split="train", vocab_size=258).sources
    count = source.num_eval_samples(T)
    found = make_batch([*((source, n) for n in range(count)), None], T, mask_documents=True)
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


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_packed_documents_are_as_each_alone(batch, impl):
    compute = Compute(
        dtype=jnp.dtype("float32"), remat="none", attention=impl, loss_chunk_tokens=64
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: Llama(MODEL, key), jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    run = jax.jit(lambda w, b: (w.logits(b, compute), w.loss_terms(b, compute).nll))
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
        assert is_start[0] or columns[0] == 0, (
            "only a sample's first piece begins inside a document"
        )
