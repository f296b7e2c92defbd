"""Hugging Face both ways against transformers: same logits, and every bit after a round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llamas import BASE, assert_same, logits, mesh, random_config, random_model, tokens

from llamajax import sharding
from llamajax.checkpoint.hf_write import export_hf, write_hf
from llamajax.checkpoint.weights import open_weights
from llamajax.models.abstract import abstract_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads would wait for those of XLA

TOLERANCE = 1e-5  # largest difference of logits over the largest logit, float32


def torch_logits(model, ids):
    with torch.no_grad():
        return model.float()(torch.tensor(ids[:, :-1])).logits.numpy()


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(4))
def test_an_export_gives_transformers_the_same_logits_and_comes_back(seed, tmp_path):
    config = random_config(seed)
    model, ids = random_model(config), tokens(config)
    export_hf(model, config, tmp_path / "hf", dtype="float32", tokenizer=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    assert_close(logits(model, ids), torch_logits(theirs, ids))
    weights = open_weights(tmp_path / "hf")
    assert weights.model == config
    assert_same(weights.load(abstract_model(config, mesh())), model)


@pytest.mark.parametrize("seed", range(4, 6))
def test_what_transformers_saves_gives_us_the_same_logits(seed, tmp_path):
    config = random_config(seed)
    export_hf(random_model(config), config, tmp_path / "hf", dtype="float32", tokenizer=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    weights = open_weights(tmp_path / "saved")
    assert weights.model == config
    ids = tokens(config)
    model = weights.load(abstract_model(config, mesh()))
    assert_close(logits(model, ids), torch_logits(theirs, ids))


def test_bfloat16_survives_a_round_trip_through_a_mesh(tmp_path):
    model = random_model(BASE)
    first = tmp_path / "first"
    export_hf(model, BASE, first, dtype="bfloat16", tokenizer=None)
    source = open_weights(first).source
    write_hf(
        source, BASE, tmp_path / "sharded", dtype="bfloat16", tokenizer=None, max_shard_bytes=9000
    )
    assert len(list((tmp_path / "sharded").glob("model-0000?-of-0000?.safetensors"))) > 2
    weights = open_weights(tmp_path / "sharded")
    wanted = abstract_model(BASE, mesh(data=2, fsdp=2, tensor=2), dtype=jnp.bfloat16)
    loaded = weights.load(wanted)
    assert loaded.embedding[...].dtype == jnp.bfloat16
    assert loaded.norm[...].dtype == jnp.float32
    export_hf(loaded, BASE, tmp_path / "again", dtype="bfloat16", tokenizer=None)
    files = [tmp_path / name / "model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_sharded_model_exports_what_a_whole_one_does(tmp_path):
    model = random_model(BASE)
    placed = jax.device_put(model, sharding.shardings(model, mesh(fsdp=4, tensor=2)))
    for name, one in (("whole", model), ("sharded", placed)):
        export_hf(one, BASE, tmp_path / name, dtype="float32", tokenizer=None)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "sharded")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_float16_is_read_and_written(tmp_path):
    export_hf(random_model(BASE), BASE, tmp_path / "hf", dtype="float16", tokenizer=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float16
    ids = tokens(BASE)
    model = open_weights(tmp_path / "hf").load(abstract_model(BASE, mesh()))
    assert_close(logits(model, ids), torch_logits(theirs, ids))
