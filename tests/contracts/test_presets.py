"""Presets against published integers, and against the weights that the model really makes."""

import jax
import pytest

from llamajax.config import PRESETS, preset
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.llama import Llama

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
}
OURS = {"bench-32m": 31_990_272, "quickstart": 5_048_576, "tiny": 71_088}
# GFLOP per trained token as the field publishes them: preset, sequence, full, causal.
GIGAFLOPS = [
    ("llama2-7b", 4096, 46.1, 42.9),
    ("llama3-8b", 8192, 57.9, 51.5),
    ("llama2-70b", 4096, 444.5, 428.4),
    ("llama3-70b", 8192, 481.4, 449.2),
]


def test_every_preset_is_counted_here():
    assert set(PRESETS) == set(PUBLISHED) | set(OURS)
    assert all(name == model.name for name, model in PRESETS.items())


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | OURS).items())
def test_parameter_counts_are_the_published_integers(name, count):
    assert num_parameters(PRESETS[name]) == count


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_makes_as_many_weights(name):
    config = PRESETS[name]
    weights = jax.eval_shape(lambda: Llama(config, jax.random.key(0)))
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    tables = 1 if config.tie_embeddings else 2
    made = sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert made - tables * padding == num_parameters(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies_need_no_padding(name):
    assert PRESETS[name].padded_vocab_size == PRESETS[name].vocab_size


@pytest.mark.parametrize(("name", "seq_len", "full", "causal"), GIGAFLOPS)
def test_operations_per_token_are_the_fields_figures(name, seq_len, full, causal):
    counted = [flops_per_token(PRESETS[name], seq_len, causal=c) / 1e9 for c in (False, True)]
    assert [round(value, 1) for value in counted] == [full, causal]


def test_scaled_rotary_embeddings_are_those_of_their_release():
    assert [name for name, model in PRESETS.items() if model.rope_scaling] == [
        "llama3.1-8b", "llama3.1-70b", "llama3.1-405b", "llama3.2-1b", "llama3.2-3b",
    ]  # fmt: skip
    assert PRESETS["llama3.1-8b"].rope_scaling.factor == 8
    assert PRESETS["llama3.2-1b"].rope_scaling.factor == 32
    assert [n for n in PUBLISHED if PRESETS[n].tie_embeddings] == [
        "llama3.2-1b", "llama3.2-3b", "smollm2-135m",
    ]  # fmt: skip


def test_a_preset_can_be_changed_without_changing_the_next():
    first = preset("llama3.1-8b")
    first.num_layers = 1
    first.rope_scaling.factor = 2.0
    assert preset("llama3.1-8b").num_layers == 32
    assert preset("llama3.1-8b").rope_scaling.factor == 8.0
