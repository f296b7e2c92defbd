"""config.json of every age gives the architecture; what is another function is refused by name."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import stored
from llama_cases import LLAMA3, ROPE_POSITIONS, ROPES, hugging_face_config, rope_config
from llamas import BASE

from llamajax.formats.huggingface.hf_config import read_model_config, write_model_config
from llamajax.ops import rope

SCALED = dataclasses.replace(BASE, rope_scaling=LLAMA3, tie_embeddings=True)
ROPE = {
    k: v for k, v in hugging_face_config(SCALED)["rope_parameters"].items() if k != "rope_theta"
}
# As transformers 5 writes it, and as published up to transformers 4.
NEW = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
NEW |= hugging_face_config(BASE) | {"dtype": "bfloat16"}
OLD = {k: v for k, v in NEW.items() if k not in ("rope_parameters", "dtype")}
OLD |= {"rope_theta": 12_345.0, "rope_scaling": None, "torch_dtype": "bfloat16"}


def read(config, **changes):
    merged = {k: v for k, v in (config | changes).items() if v is not ...}
    return read_model_config(merged)


@pytest.mark.parametrize("config", [OLD, NEW], ids=["old keys", "new keys"])
def test_both_ages_are_read(config):
    assert read(config) == (BASE, [])


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (OLD, {"rope_scaling": ROPE}),
        (OLD, {"rope_scaling": ROPE | {"rope_type": None, "type": "llama3"}}),
        (NEW, {"rope_parameters": ROPE | {"rope_theta": 12_345.0}}),
    ],
    ids=["rope_type", "type", "rope_parameters"],
)  # fmt: skip
def test_llama3_scaling_is_read(config, changes):
    assert read(config, tie_word_embeddings=True, **changes) == (SCALED, [])


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_embeddings_are_those_of_transformers(name):
    """Its cosines and sines; and `original_max_position_embeddings` wherever it reads it."""
    model, problems = read_model_config(rope_config(name))
    assert problems == []
    scaling = model.rope_scaling
    assert scaling == ROPES[name][1]
    frequency = rope.frequencies(model.head_size, theta=model.rope_theta, scaling=scaling)
    tables = rope.angles(jnp.asarray(ROPE_POSITIONS), frequency, rope.attention_factor(scaling))
    np.testing.assert_allclose(tables, stored.arrays("stored")[f"rope/{name}"], rtol=0, atol=1e-5)


def test_absent_keys_mean_what_transformers_takes():
    absent = ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings")
    model, problems = read(OLD, **dict.fromkeys(absent, ...))
    assert problems == []
    wanted = dataclasses.replace(BASE, num_kv_heads=4, head_size=6, rope_theta=10_000.0)
    assert model == wanted


@pytest.mark.parametrize(
    "model",
    [BASE, SCALED, *(dataclasses.replace(BASE, rope_scaling=s) for _, s in ROPES.values() if s)],
    ids=["plain", "scaled and tied", *(name for name, (_, s) in ROPES.items() if s)],
)
@pytest.mark.parametrize(
    "dropped",
    [(), ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")],
    ids=["both", "old keys", "new keys"],
)
def test_what_is_written_is_read_whole_or_by_either_half(model, dropped):
    config = write_model_config(model, dtype="float32", ids={"bos_token_id": 1, "eos_token_id": 2})
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (1, 2, "float32")
    assert read(config, **dict.fromkeys(dropped, ...)) == (model, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, ["model_type 'mistral'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
        ({"attention_bias": True, "mlp_bias": True}, ["attention_bias is", "mlp_bias is"]),
        (
            {"rope_scaling": {"type": "yran", "factor": 2.0}},
            ["rope type 'yran' is not supported; only default, linear, llama3, yarn are; did you"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor = 0.5: must be at least 1"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope type linear without factor"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ["rope type yarn without original_max_position_embeddings"],
        ),
        (
            {"rope_scaling": ROPE | {"rope_type": "yarn", "mscale": "1"}},
            ["rope type yarn: mscale '1' is not a number above 0"],
        ),
        ({"rope_scaling": ROPE | {"factor": None}}, ["llama3 without factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config (gptq)"]),
        ({"rms_norm_eps": ..., "vocab_size": ...}, ["rms_norm_eps is m", "vocab_size is m"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads = 3: must divide"]),
        ({"hidden_size": "many"}, ["hidden_size"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(changes, words):
    model, problems = read(OLD, **changes)
    assert model is None
    assert len(problems) == len(words)
    for word, problem in zip(words, sorted(problems), strict=True):
        assert word in problem
