"""Hugging Face both ways: the logits of transformers, and every bit after a round trip."""

import json

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
import safetensors.numpy
import stored
from llamas import BASE, assert_close, export_hf, load, logits, random_model
from meshes import mesh_of
from tiny_state import assert_same_bits

from llamajax import sharding
from llamajax.formats.foreign_weights import Export
from llamajax.formats.huggingface.hf_write import write_hf
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model

RANDOM = [name for name in llama_cases.STORED if name.startswith("random")]
RANDOM += ["linear", "other yarn"]


def export(model, config, path, dtype="float32"):
    export_hf(model, config, path, dtype)
    return path


def assert_same_tensors(path, expected):
    """What the library safetensors reads of an export."""
    actual = safetensors.numpy.load_file(path / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def assert_same_files(one, other):
    files = [path / "model.safetensors" for path in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", RANDOM)
def test_weights_give_the_logits_of_transformers_and_go_back(name, tmp_path):
    config = llama_cases.STORED[name]
    theirs, ids = llama_cases.weights(config), llama_cases.tokens(config)
    weights = open_weights(llama_cases.save_hugging_face(tmp_path / "hf", config, theirs))
    assert weights.model == config
    model = weights.load(abstract_model(config, mesh_of()))
    assert_close(logits(model, ids), stored.arrays("stored")[name])
    again = tmp_path / "again"
    warnings = export_hf(model, config, again)
    unlike = name == "other yarn"  # its context is not factor x original, and it has no truncate
    assert len(warnings) == 2 * unlike
    for words in ("4.51 to 4.55 scale by", "before 4.55 ignores rope_scaling.truncate = false,"):
        assert sum(words in line for line in warnings) == unlike
    assert_same_tensors(again, theirs)
    written = json.loads((again / "config.json").read_text())
    expected = llama_cases.hugging_face_config(config) | {"model_type": "llama", "dtype": "float32"}
    assert {key: written[key] for key in expected} == expected
    assert_same_bits(load(again), model)


def test_what_transformers_saves_gives_the_same_logits():
    config, folder = llama_cases.STORED["small"], stored.FOLDER / "small"
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) > 1
    weights = open_weights(folder)
    assert weights.model == config
    for name, array in llama_cases.weights(config).items():
        np.testing.assert_array_equal(weights.source.read(name), array, err_msg=name)
    assert_close(logits(load(folder), llama_cases.tokens(config)), stored.arrays("stored")["small"])


def test_bfloat16_survives_a_round_trip_through_a_mesh(tmp_path):
    first, shards = export(random_model(BASE), BASE, tmp_path / "1", "bfloat16"), tmp_path / "2"
    source = open_weights(first).source
    again = Export(source=source, model=BASE, tokenizer=None)
    write_hf(again, shards, dtype="bfloat16", max_shard_bytes=9000)
    assert len(list(shards.glob("model-0000?-of-0000?.safetensors"))) > 2
    wanted = abstract_model(BASE, mesh_of(data=2, fsdp=2, tensor=2), dtype=jnp.bfloat16)
    loaded = open_weights(shards).load(wanted)
    assert loaded.embedding[...].dtype == jnp.bfloat16
    assert loaded.norm[...].dtype == jnp.float32
    assert_same_files(first, export(loaded, BASE, tmp_path / "3", "bfloat16"))


def test_a_sharded_model_exports_what_a_whole_one_does(tmp_path):
    model = random_model(BASE)
    sharded = jax.device_put(model, sharding.shardings(model, mesh_of(fsdp=4, tensor=2)))
    whole = export(model, BASE, tmp_path / "whole")
    assert_same_files(whole, export(sharded, BASE, tmp_path / "sharded"))


def test_float16_is_read_and_written(tmp_path):
    config = llama_cases.STORED["plain"]
    theirs = llama_cases.weights(config)
    model = load(llama_cases.save_hugging_face(tmp_path / "whole", config, theirs))
    half = export(model, config, tmp_path / "half", "float16")
    assert_same_tensors(half, {name: array.astype(np.float16) for name, array in theirs.items()})
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"
    ours = logits(load(half), llama_cases.tokens(config))
    assert_close(ours, stored.arrays("stored")["plain, float16"])


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["random 2", "random 4", "small", "linear", "yarn", "other yarn"])
def test_transformers_loads_an_export(name, dtype, tmp_path, live):
    config = llama_cases.STORED[name]
    ids, path = llama_cases.tokens(config), tmp_path / "hf"
    export(random_model(config), config, path, dtype)
    theirs = live.transformers.AutoModelForCausalLM.from_pretrained(path)
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert_close(logits(load(path), ids), live.logits(theirs.float(), ids))
