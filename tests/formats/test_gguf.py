"""GGUF files: the same logits as transformers, block arithmetic, tokenizers, refusals."""

import base64
import dataclasses
import itertools
import re
import sys

import gguf
import numpy as np
import pytest
import stored
from gguf_cases import as_gguf, gguf_metadata
from llama_cases import STORED, tokens, weights
from llamas import assert_close, load, logits
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from llamajax.config.model_schema import RopeScaling
from llamajax.errors import UserError
from llamajax.formats.weights import open_weights
from llamajax.ops.rope import frequencies
from llamajax.tokenizers import load_tokenizer
from llamajax.tokenizers.byte_level import BYTE_LETTERS

PLAIN = STORED["plain"]
Type = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return as_gguf(PLAIN)


@pytest.fixture
def store(tmp_path, arrays):
    """Returns what writes a GGUF file."""

    def store(c=PLAIN, arrays=arrays, *, kind=Type.F32, architecture="llama", more=None):
        """`more` adds to or (None) takes from the metadata. Matrices are stored as `kind`, but for
        those of a pair: its type and bytes."""
        file = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(file, architecture)
        facts = gguf_metadata(c) | (more or {})
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            bool: writer.add_bool, list: writer.add_array,
        }  # fmt: skip
        for key, value in facts.items():
            if value is not None:
                add[type(value)](key, value)
        for name, array in arrays.items():
            one, content = array if isinstance(array, tuple) else (None, None)
            if one is None:
                one = kind if array.ndim == 2 else Type.F32
                content = gguf.quantize(array, one)
            writer.add_tensor(name, content, raw_dtype=one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return store


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_tensors_are_half_split_and_slices_those_of_the_whole(store, kind):
    source, exact = open_weights(store(kind=kind)).source, weights(PLAIN)
    assert sorted(source.names()) == sorted(exact)
    for name, expected in exact.items():
        whole = source.read(name)
        assert whole.shape == source.shape(name) == expected.shape
        assert whole.dtype == source.dtype(name)
        # A step of Q4_1 is a fifteenth of the range of its block, of Q4_0 an eighth of the largest.
        step = {Type.F32: 0, Type.Q4_0: 0.15, Type.Q4_1: 0.1}.get(kind, 0.01)
        largest = np.abs(expected).max()
        assert np.abs(whole.astype(np.float32) - expected).max() <= step * largest, name
        cut = (slice(5, len(whole) - 3), slice(7, whole.shape[-1] - 9))[: whole.ndim]
        assert np.array_equal(source.read(name, cut), whole[cut]), name


def test_logits_equal_transformers(store, tmp_path):
    for path in (store(), tmp_path):
        opened = open_weights(path)
        assert (opened.kind, opened.model) == ("gguf", PLAIN)
    ours = logits(load(tmp_path, fsdp=2, tensor=2), tokens(PLAIN))
    assert_close(ours, stored.arrays("stored")["plain"])


@pytest.mark.parametrize("name", ["tied", "llama31"])
def test_tied_heads_and_scaled_rotary_embeddings(store, name):
    config = STORED[name]
    found = as_gguf(config)
    if config.rope_scaling is not None:
        size, theta = config.head_size, config.rope_theta
        plain, slow = (frequencies(size, theta=theta, scaling=s)
                       for s in (None, config.rope_scaling))  # fmt: skip
        found["rope_freqs.weight"] = plain / slow
    file = store(config, found)
    assert open_weights(file).model == config
    assert_close(logits(load(file), tokens(config)), stored.arrays("stored")[name])
    if config.rope_scaling is not None:
        found["rope_freqs.weight"] = found["rope_freqs.weight"] ** 0.9
        with pytest.raises(UserError, match=r"rope_freqs\.weight holds other factors than Llama"):
            open_weights(store(config, found))


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 4.0}, {"type": "linear", "factor": 4.0}),
        (YARN, {"type": "yarn", "factor": 4.0, "original_max_seq_len": PLAIN.max_seq_len}),
        (
            YARN | {"llama.rope.scaling.original_context_length": 16}
            | {"llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.yarn_beta_slow": 2.0}
            | {"llama.rope.scaling.yarn_attn_factor": 1.5, "llama.rope.scaling.attn_factor": 0.5},
            {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16, "beta_fast": 8.0,
             "beta_slow": 2.0, "attention_factor": 0.75},
        ),
        ({"llama.rope.scaling.type": "longrope"}, "type = 'longrope': only none, linear and yarn"),
        ({"llama.rope.scaling.factor": 0.5}, "rope_scaling.factor = 0.5: must be at least 1"),
        (YARN | {"llama.rope.scaling.yarn_ext_factor": 0.5}, "ext_factor = 0.5: only 1.0 can"),
        (YARN | {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "log_multiplier = 0.1"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5: only 1.0 can be imported"),
    ],
)  # fmt: skip
def test_scalings_in_the_metadata(store, more, keys):
    """As llama.cpp reads them: linear without a type, the context where no original is given."""
    file = store(more=more)
    if isinstance(keys, str):
        with pytest.raises(UserError, match=re.escape(keys)):
            open_weights(file)
        return
    assert open_weights(file).model.rope_scaling == (keys and RopeScaling(**keys))


BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ3_S"]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_dequantized_as_by_the_package(store, arrays, name):
    """Bytes at random, as the package cannot make most of the types that published files have."""
    kind, wide = Type[name], dataclasses.replace(PLAIN, intermediate_size=512)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 60, (64, 512 // values * size), np.uint8)  # no scale is NaN
    found = arrays | {
        f"blk.{i}.{part}.weight": np.zeros((512, 64), np.float32)
        for i in range(2)
        for part in ("ffn_gate", "ffn_up")
    }
    found |= {f"blk.{i}.ffn_down.weight": (kind, blocks) for i in range(2)}
    source, name = open_weights(store(wide, found)).source, "model.layers.1.mlp.down_proj.weight"
    expected = gguf.dequantize(blocks, kind)
    assert np.array_equal(source.read(name), expected)
    cut = (slice(3, 9), slice(200, 300))
    assert np.array_equal(source.read(name, cut), expected[cut])


def byte_level(*, pre: str) -> dict:
    """Metadata of a tokenizer: 256 bytes, four merges, BOS and EOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["th", "the", "11", "Ġ<", "Ġthe", "xyz"]  # no merges lead to the last
    names = [*letters, *merged, "<|begin_of_text|>", "<|end_of_text|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [1] * (len(names) - 2) + [3, 3],
        "tokenizer.ggml.merges": ["t h", "th e", "1 1", "Ġ <", "Ġ the"],
        "tokenizer.ggml.bos_token_id": len(names) - 2,
        "tokenizer.ggml.eos_token_id": len(names) - 1,
    }


@pytest.mark.parametrize(("pre", "ones"), [("smollm", 4), ("llama-bpe", 3), ("gpt-2", 2)])
def test_byte_level_tokenizers(store, pre, ones):
    """How digits are split tells the three apart: one by one, by three, not at all."""
    tokenizer = load_tokenizer(open_weights(store(more=byte_level(pre=pre))).tokenizer)
    assert len(tokenizer.encode("1111")) == ones
    assert len(tokenizer.encode("xyz")) == (1 if pre == "llama-bpe" else 3)
    names = byte_level(pre=pre)["tokenizer.ggml.tokens"]
    assert [names[i] for i in tokenizer.encode("the the")] == ["the", "Ġthe"]
    assert [names[i] for i in (tokenizer.bos_id, tokenizer.eos_id)] == names[-2:]
    for text in ("", " a  b\n\n", "<|begin_of_text|>x", "emoji 🦙", "nul\x00", "it's WE'LL 1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))


def test_llama3s_own_ranks_as_gguf_has_them(store, tmp_path, assets):
    """Converted as llama.cpp does it, from the merges that the ranks imply, on a real text."""
    lines = (assets / "tokenizers" / "llama3.model").read_bytes().splitlines()[:20_000]
    ranks = [base64.b64decode(line.split()[0]) for line in lines]
    order = {token: i for i, token in enumerate(ranks)}
    merges = []
    for token in ranks[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [order.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
            i = int(np.argmin(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(" ".join("".join(BYTE_LETTERS[b] for b in part) for part in parts))
    names = ["".join(BYTE_LETTERS[b] for b in token) for token in ranks]
    more = byte_level(pre="llama-bpe") | {
        "tokenizer.ggml.tokens": [*names, "<|begin_of_text|>", "<|end_of_text|>"],
        "tokenizer.ggml.token_type": [1] * len(names) + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(names),
        "tokenizer.ggml.eos_token_id": len(names) + 1,
    }
    small = tmp_path / "small.model"
    small.write_bytes(b"\n".join(lines))
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")[20_000:120_000]
    text += " It's 12345 o'clock\n\n\t  and\r\n日本語 🦙 don't"
    found = load_tokenizer(open_weights(store(more=more)).tokenizer)
    assert found.encode(text) == load_tokenizer(small).encode(text)


def test_a_sentencepiece_model_taken_apart_is_put_together(store, assets):
    file = assets / "tokenizers" / "llama2.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    more = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.piece for p in model.pieces],
        "tokenizer.ggml.scores": [p.score for p in model.pieces],
        "tokenizer.ggml.token_type": [p.type for p in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    found = load_tokenizer(open_weights(store(more=more)).tokenizer)
    assert found.encode("Hello world") == [15043, 3186]
    assert (found.bos_id, found.eos_id, found.vocab_size) == (1, 2, 32_000)
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")[:200_000]
    text += "<s> </s> <unk> [INST]  x\n\n\t🦙 \x00 日本語"
    assert found.encode(text) == load_tokenizer(file).encode(text)
    assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "qwen2", "pre 'qwen2': known are"),
        ("model", "bert", "model 'bert'"),
        ("merges", None, "merges is missing"),
        ("merges", ["t x"], "merges tokens that are not in"),
        ("token_type", [1, 1], "different lengths"),
        ("bos_token_id", 999, "outside of its vocabulary"),
    ],
)
def test_no_tokenizer_and_a_note_where_it_is_unknown(store, capsys, key, value, message):
    more = byte_level(pre="smollm") | {f"tokenizer.ggml.{key}": value}
    assert open_weights(store(more=more)).tokenizer is None
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention.head_count": None}, r"head_count = None: must be one int"),
        ({"expert_count": 8}, r"llama\.expert_count = 8: only 0"),
        ({"rope.dimension_count": 8}, r"dimension_count = 8: only 16"),
        ({"attention.sliding_window": 4096}, "sliding_window = 4096"),
        ({"attention.head_count_kv": [2, 2]}, r"head_count_kv = \[2 2\]: must be one int above 0"),
        ({"attention.head_count_kv": 3}, r"num_kv_heads = 3: must divide"),
        ({"block_count": 1}, r"layers\.1\..*: not part of a Llama of this"),
        ({"block_count": 3}, r"layers\.2\..*: missing"),
        ({"embedding_length": 32}, "has shape"),
    ],
)
def test_metadata_of_other_models_is_refused(store, more, message):
    file = store(more={f"llama.{key}": value for key, value in more.items()})
    with pytest.raises(UserError, match=message):
        open_weights(file)


@pytest.mark.parametrize(
    ("odd", "architecture", "message"),
    [
        ({"attn_q.bias": np.ones(64, np.float32)}, "llama", r"1\.attn_q\.bias: no part of a Llama"),
        (
            {"ffn_up.weight": (Type.TQ1_0, np.zeros((96, 54), np.uint8))},
            "llama",
            r"blk\.1\.ffn_up\.weight: type TQ1_0 cannot be read",
        ),
        ({}, "qwen2", "architecture 'qwen2'"),
    ],
)
def test_other_tensors_types_and_architectures_are_named(store, arrays, odd, architecture, message):
    found = arrays | {f"blk.1.{name}": array for name, array in odd.items()}
    with pytest.raises(UserError, match=message):
        open_weights(store(arrays=found, architecture=architecture))


def test_damage_costs_one_message(store):
    file = store(more=byte_level(pre="smollm"))
    content = file.read_bytes()
    cuts = [(content[:size], "truncated or damaged|GGUF version") for size in (4, 10, 30, 500)]
    for damaged, message in (
        *cuts,
        (content[:3000], "truncated or damaged"),
        (content[:-4000], r"output\.weight: ends after the file .*truncated"),
        (content[:4] + b"\x00\x00\x00\x03" + content[8:], "GGUF version 50331648; little-endian"),
        (b"", "not a GGUF file: it starts with b''"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_weights(file)


def test_several_files_and_a_missing_package(store, tmp_path, monkeypatch):
    file = store()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match=r"pip install 'llamajax\[gguf\]'") as caught:
            open_weights(file)
        assert str(caught.value).count("\n") == 0
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 GGUF files, name one of them: b\.gguf, model\.gguf"):
        open_weights(tmp_path)
