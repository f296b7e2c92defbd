"""Generated tokens: the same alone, in a batch, in any bucket, on any mesh; where rows stop."""

import jax
import numpy as np
import pytest

from llamajax.config.schema import MeshConfig
from llamajax.models.llama import Llama

PROMPTS = {
    0: [1, 2, 3],
    1: list(range(7, 29)),
    2: [96],
    3: [5, 5, 5, 5, 9],
    4: list(range(40, 57)),
}
DRAWN = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def engine(new_engine):
    """One that draws, on one device."""
    return new_engine(**DRAWN)


@pytest.fixture(scope="module")
def drawn(engine, new_tokens):
    """What the others are compared with: all prompts in one batch on one device."""
    return new_tokens(engine, PROMPTS)


def test_the_draws_differ_between_seeds_and_prompts(engine, new_tokens, drawn):
    assert new_tokens(engine, PROMPTS, seed=0) == drawn
    assert new_tokens(engine, PROMPTS, seed=1) != drawn
    same = new_tokens(engine, dict.fromkeys(PROMPTS, PROMPTS[1]))
    assert len({tuple(ids) for ids in same.values()}) == 5
    assert all(len(ids) == 12 and len(set(ids)) > 3 for ids in drawn.values())


def test_neither_batch_nor_bucket_nor_chunk_changes_a_token(engine, new_tokens, drawn):
    assert new_tokens(engine, {3: PROMPTS[3]}) == {3: drawn[3]}  # alone, in the smallest bucket
    some = {4: PROMPTS[4], 2: PROMPTS[2], 0: PROMPTS[0]}  # another order, a batch of four
    assert new_tokens(engine, some) == {n: drawn[n] for n in some}
    longer = new_tokens(engine, PROMPTS, count=40)  # another cache, more than one chunk
    assert {n: ids[:12] for n, ids in longer.items()} == drawn
    # a person watches: many small chunks
    assert new_tokens(engine, PROMPTS, count=40, interval_s=1e-9) == longer


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(tensor=2), MeshConfig(fsdp=2, data=2, tensor=2)],
    ids=["tensor 2", "data 2 fsdp 2 tensor 2"],
)
def test_every_mesh_draws_the_same_tokens(new_engine, new_tokens, drawn, mesh):
    assert new_tokens(new_engine(mesh=mesh, **DRAWN), PROMPTS) == drawn


def test_a_session_compiles_a_bounded_number_of_programs(new_engine, new_tokens):
    engine = new_engine()
    for length in range(1, 33):
        new_tokens(engine, {0: [3] * length}, count=3)
    # buckets of 16 and 32 tokens: a prefill and a decode program each
    assert sorted(key[0] for key in engine.programs) == ["decode"] * 2 + ["prefill"] * 2


def test_the_rows_that_pad_the_vocabulary_are_never_drawn(new_engine, new_tokens):
    engine = new_engine(temperature=1e4)
    found = new_tokens(engine, PROMPTS, count=60)
    ids = np.concatenate(list(found.values()))
    assert ids.size == 300
    assert 0 <= ids.min() < 10
    assert 86 < ids.max() < 97


def test_a_stop_token_ends_its_row_and_no_other(new_engine, new_tokens):
    free = new_tokens(new_engine(), PROMPTS, count=40)
    stop = free[0][2]  # in the middle of row 0
    stopped = new_tokens(new_engine(stop_ids=(stop, 96)), PROMPTS, count=40)
    for number, ids in free.items():
        ends = [i for i, token in enumerate(ids) if token in (stop, 96)]
        assert stopped[number] == (ids[: ends[0] + 1] if ends else ids)
    assert len(stopped[0]) <= 3
    assert max(map(len, stopped.values())) > 3


def test_nothing_is_decoded_when_the_first_token_stops_all(new_engine, new_tokens):
    first = new_tokens(new_engine(), {0: [1, 2, 3]}, count=1)[0]
    engine = new_engine(stop_ids=first)
    assert new_tokens(engine, {0: [1, 2, 3]}, count=40) == {0: first}
    assert [key[0] for key in engine.programs] == ["prefill"]


def test_the_speed_counts_new_tokens_of_prompts_alone(new_engine, new_tokens):
    engine = new_engine(mesh=MeshConfig(data=4))
    new_tokens(engine, {0: [1], 1: [2]}, count=5)  # two rows of the four are no prompts
    assert (engine.times.batches, engine.times.decode_tokens) == (1, 8)


@pytest.mark.parametrize("name", ["tied", "llama3 rope"])
def test_greedy_tokens_equal_transformers(configs, new_engine, new_tokens, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # its threads would wait for those of XLA
    config = configs[name]
    model = jax.jit(lambda key: Llama(config, key))(jax.random.key(2))
    reference = as_transformers(torch, transformers, config, model)
    found = new_tokens(new_engine(model=model), PROMPTS, count=30)
    for number, ids in PROMPTS.items():
        expected = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=30,
        )
        assert found[number] == expected[0, len(ids) :].tolist()
    assert len({tuple(ids) for ids in found.values()}) > 1


def as_transformers(torch, transformers, c, model):
    """transformers' Llama with the weights of ours."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        rope |= {name: getattr(c.rope_scaling, name) for name in names}
        rope["original_max_position_embeddings"] = c.rope_scaling.original_max_seq_len
        rope["rope_type"] = "llama3"
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_size,
            rope_parameters=rope,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            max_position_embeddings=c.max_seq_len,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ).float()
    weights, D = dict(reference.named_parameters()), c.hidden_size
    arrays = {"model.embed_tokens": model.embedding, "model.norm": model.norm}
    if model.head is not None:
        arrays["lm_head"] = model.head
    values = {k: np.asarray(w[...])[: c.vocab_size] for k, w in arrays.items()}
    values["model.norm"] = np.asarray(model.norm[...])
    blocks = model.blocks
    for i in range(c.num_layers):
        layer = f"model.layers.{i}."
        a, m = blocks.attention, blocks.mlp
        for theirs, weight in (("q", a.query), ("k", a.key), ("v", a.value)):
            values[f"{layer}self_attn.{theirs}_proj"] = np.asarray(weight[...])[i].reshape(D, -1).T
        values[f"{layer}self_attn.o_proj"] = np.asarray(a.out[...])[i].reshape(-1, D).T
        for theirs, weight in (("gate", m.gate), ("up", m.up), ("down", m.down)):
            values[f"{layer}mlp.{theirs}_proj"] = np.asarray(weight[...])[i].T
        values[f"{layer}input_layernorm"] = np.asarray(blocks.attention_norm[...])[i]
        values[f"{layer}post_attention_layernorm"] = np.asarray(blocks.mlp_norm[...])[i]
    assert {f"{k}.weight" for k in values} == weights.keys()
    with torch.no_grad():
        for key, value in values.items():
            weights[f"{key}.weight"].copy_(torch.from_numpy(np.array(value)))
    return reference.eval()
