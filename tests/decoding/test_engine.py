"""Generated tokens: the same alone, in a batch, in any bucket, on any mesh; where rows stop."""

import functools
import types

import jax
import numpy as np
import pytest
import stored
from llama_cases import DECODED, NEW_TOKENS, PROMPTS, save_hugging_face, weights
from meshes import mesh_of
from tiny_model import tiny_model

from llamajax import sharding
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.prompts import Prompt
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.models.llama import Llama
from llamajax.ops.attention import AttentionChoice

# Weights large enough that greedy text is no repetition of one token.
MODEL = tiny_model(hidden_size=24, intermediate_size=52, head_size=6, max_seq_len=96)
DRAWN = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.1}


@functools.cache
def random_model() -> Llama:
    return jax.jit(lambda key: Llama(MODEL, key))(jax.random.key(0))


def new_engine(*, model=None, sizes=None, stop_ids=(), **sampling) -> Engine:
    """An engine on a mesh, with random or given weights."""
    mesh, model = mesh_of(**(sizes or {})), model or random_model()
    loaded = types.SimpleNamespace(
        model=jax.device_put(model, sharding.shardings(model, mesh)),
        mesh=mesh,
        dtype="float32",
        attention=lambda seq_len: AttentionChoice("blocked", "a test has no kernel", True),
    )
    return Engine(loaded, sampling=Sampling(**({"temperature": 0.0} | sampling)), stop_ids=stop_ids)


def new_tokens(engine, prompts, *, count=12, seed=0, interval_s=None) -> dict[int, list[int]]:
    """All new tokens of prompts, given as {number: ids}."""
    rows = [Prompt(number, ids, count) for number, ids in prompts.items()]
    *_, found = engine.generate(rows, seed=seed, interval_s=interval_s)
    return dict(zip(prompts, found, strict=True))


def test_a_kernel_that_was_passed_over_is_said_once(capsys):
    engine = new_engine()
    for prompt in ([1, 2, 3], [*range(1, 20)]):
        new_tokens(engine, {0: prompt}, count=1)
    assert len(engine.programs) == 2
    words = "warning: attention blocked, because a test has no kernel"
    assert capsys.readouterr().err.splitlines() == [words]


@pytest.fixture(scope="module")
def engine():
    """One that draws, on one device."""
    return new_engine(**DRAWN)


@pytest.fixture(scope="module")
def drawn(engine):
    """What the others are compared with: all prompts in one batch on one device."""
    return new_tokens(engine, PROMPTS)


def test_the_draws_differ_between_seeds_and_prompts(engine, drawn):
    assert new_tokens(engine, PROMPTS, seed=0) == drawn
    assert new_tokens(engine, PROMPTS, seed=1) != drawn
    same = new_tokens(engine, dict.fromkeys(PROMPTS, PROMPTS[1]))
    assert len({tuple(ids) for ids in same.values()}) == 5
    assert all(len(ids) == 12 and len(set(ids)) > 3 for ids in drawn.values())


def test_neither_batch_nor_bucket_nor_chunk_changes_a_token(engine, drawn):
    assert new_tokens(engine, {3: PROMPTS[3]}) == {3: drawn[3]}  # alone, in the smallest bucket
    some = {4: PROMPTS[4], 2: PROMPTS[2], 0: PROMPTS[0]}  # another order, a batch of four
    assert new_tokens(engine, some) == {n: drawn[n] for n in some}
    longer = new_tokens(engine, PROMPTS, count=40)  # another cache, more than one chunk
    assert {n: ids[:12] for n, ids in longer.items()} == drawn
    # a person watches: many small chunks
    assert new_tokens(engine, PROMPTS, count=40, interval_s=1e-9) == longer


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"fsdp": 2, "data": 2, "tensor": 2}], ids=str)
def test_every_mesh_draws_the_same_tokens_with_what_was_compiled_before(drawn, sizes):
    engine = new_engine(sizes=sizes, **DRAWN)
    engine.compile([Prompt(number, ids, 12) for number, ids in PROMPTS.items()])
    compiled = list(engine.programs)
    assert new_tokens(engine, PROMPTS) == drawn
    assert list(engine.programs) == compiled


def test_a_session_compiles_a_bounded_number_of_programs():
    engine = new_engine()
    for length in range(1, 33):
        new_tokens(engine, {0: [3] * length}, count=3)
    # buckets of 16 and 32 tokens: a prefill and a decode program each
    assert sorted(key[0] for key in engine.programs) == ["decode"] * 2 + ["prefill"] * 2


def test_the_rows_that_pad_the_vocabulary_are_never_drawn():
    engine = new_engine(temperature=1e4)
    found = new_tokens(engine, PROMPTS, count=60)
    ids = np.concatenate(list(found.values()))
    assert ids.size == 300
    assert 0 <= ids.min() < 10
    assert 86 < ids.max() < 97


def test_a_stop_token_ends_its_row_and_no_other():
    free = new_tokens(new_engine(), PROMPTS, count=40)
    stop = free[0][2]  # in the middle of row 0
    stopped = new_tokens(new_engine(stop_ids=(stop, 96)), PROMPTS, count=40)
    for number, ids in free.items():
        ends = [i for i, token in enumerate(ids) if token in (stop, 96)]
        assert stopped[number] == (ids[: ends[0] + 1] if ends else ids)
    assert len(stopped[0]) <= 3
    assert max(map(len, stopped.values())) > 3


def test_nothing_is_decoded_when_the_first_token_stops_all():
    first = new_tokens(new_engine(), {0: [1, 2, 3]}, count=1)[0]
    engine = new_engine(stop_ids=first)
    assert new_tokens(engine, {0: [1, 2, 3]}, count=40) == {0: first}
    assert [key[0] for key in engine.programs] == ["prefill"]


def test_the_speed_counts_new_tokens_of_prompts_alone():
    engine = new_engine(sizes={"data": 4})
    new_tokens(engine, {0: [1], 1: [2]}, count=5)  # two rows of the four are no prompts
    assert (engine.times.batches, engine.times.decode_tokens) == (1, 8)


@pytest.mark.parametrize("name", DECODED)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    config = DECODED[name]
    folder = save_hugging_face(tmp_path, config, weights(config, std=0.3))
    model = open_weights(folder).load(abstract_model(config, mesh_of()))
    found = new_tokens(new_engine(model=model), PROMPTS, count=NEW_TOKENS)
    assert list(found.values()) == stored.facts()["decoded"][name]
    assert len({tuple(ids) for ids in found.values()}) > 1
