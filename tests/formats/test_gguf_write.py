"""GGUF files of ours: what the gguf package and our own reader find in them."""

import dataclasses
import json
import shutil

import gguf
import numpy as np
import pytest
import stored
from chat_cases import PUBLISHED, save_byte_level
from gguf_cases import as_gguf, gguf_metadata
from llama_cases import STORED, save_hugging_face, tokens, weights
from llamas import assert_close, load, logits
from small_tokenizers import small_ranks

from llamajax import convert
from llamajax.errors import UserError
from llamajax.formats.weights import open_weights
from llamajax.tokenizers import load_tokenizer
from llamajax.tokenizers.tokenizer_identity import same_tokens

Type = gguf.GGMLQuantizationType
TYPES = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16, "q8_0": Type.Q8_0}


def write(source, file, *flags: str):
    assert convert.main([f"--from={source}", "--format=gguf", f"--to={file}", *flags]) == 0
    return file


@pytest.mark.parametrize("name", ["plain", "tied", "llama31", "linear", "yarn"])
def test_float32_comes_back_and_computes_the_same(name, tmp_path):
    c, arrays = STORED[name], weights(STORED[name])
    file = write(
        save_hugging_face(tmp_path / "hf", c, arrays), tmp_path / "x.gguf", "--dtype=float32"
    )
    opened = open_weights(file)
    assert opened.model == c
    for tensor, expected in arrays.items():
        np.testing.assert_array_equal(opened.source.read(tensor), expected, err_msg=tensor)
    assert_close(logits(load(file), tokens(c)), stored.arrays("stored")[name])


def test_a_yarn_that_llama_cpp_cannot_compute_is_refused(tmp_path):
    """Its attention factor can be said, as a multiple of the usual one."""
    c = STORED["other yarn"]
    source = save_hugging_face(tmp_path / "hf", c, weights(c))
    with pytest.raises(UserError, match=r"rope_scaling\.beta_fast = 4\.0: llama\.cpp computes"):
        write(source, tmp_path / "x.gguf", "--dtype=float32")
    assert not list(tmp_path.glob("*.gguf*"))
    usual = dataclasses.replace(c.rope_scaling, beta_fast=32.0, beta_slow=1.0, truncate=True)
    c = dataclasses.replace(c, rope_scaling=usual)
    opened = open_weights(write(save_hugging_face(source, c, weights(c)), tmp_path / "x.gguf"))
    assert opened.model.rope_scaling.attention_factor == pytest.approx(1.375, rel=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gguf_package_reads_the_blocks_that_it_would_write(dtype, tmp_path):
    c = dataclasses.replace(STORED["plain"], intermediate_size=80)  # no multiple of 32
    source = save_hugging_face(tmp_path / "hf", c, weights(c))
    reader = gguf.GGUFReader(write(source, tmp_path / "x.gguf", f"--dtype={dtype}"))
    expected = as_gguf(c)
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        array = expected[tensor.name]
        kind = TYPES[dtype] if array.ndim == 2 else Type.F32
        if kind == Type.Q8_0 and array.shape[1] % 32:
            kind = Type.F16  # as llama.cpp's converter does
        assert (tensor.tensor_type, tuple(tensor.shape)) == (kind, array.shape[::-1]), tensor.name
        np.testing.assert_array_equal(tensor.data, gguf.quantize(array, kind), err_msg=tensor.name)
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert (
        found["general.file_type"]
        == gguf.LlamaFileType[{"float32": "ALL_F32"}.get(dtype, f"MOSTLY_{TYPES[dtype].name}")]
    )
    assert found["tokenizer.ggml.model"] == "no_vocab"
    for key, number in gguf_metadata(c).items():
        assert found[key] == np.float32(number), key
    assert found["llama.vocab_size"] == c.vocab_size
    assert found["llama.attention.value_length"] == c.head_size


@pytest.mark.parametrize("kind", ["byte", "llama2", "tiktoken", "chatml"])
def test_the_tokenizer_goes_along_with_its_template(kind, tmp_path, assets, capsys):
    c = dataclasses.replace(STORED["plain"], vocab_size=32_003)
    source = save_hugging_face(tmp_path / "hf", c, weights(c))
    model = source / "tokenizer.model"
    make = {
        "byte": lambda: (source / "tokenizer.byte").touch(),
        "llama2": lambda: shutil.copy(assets / "tokenizers" / "llama2.model", model),
        "tiktoken": lambda: small_ranks(model),
        "chatml": lambda: save_byte_level(
            source / "tokenizer.json", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        ),
    }
    make[kind]()
    (source / "chat_template.jinja").write_text(PUBLISHED["chatml"])
    if kind == "chatml":
        named = {"unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(named))
    original = load_tokenizer(source)
    turn = original.control_ids.get("<|eot_id|>", original.control_ids.get("<|im_end|>", 9))
    stops = dict.fromkeys((original.eos_id, 7, 8, turn, 10))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [*stops]}))
    file = write(source, tmp_path / "x.gguf")
    found = open_weights(file).load_tokenizer()
    assert same_tokens(found, original)
    lost = sorted({*stops} - {*found.stop_ids})
    assert lost
    assert turn not in lost or turn == 9  # the end of a turn comes before other stop tokens
    assert f"does not name {lost}" in capsys.readouterr().err
    assert found.facts.chat_template == PUBLISHED["chatml"]
    fields = {key: f.contents() for key, f in gguf.GGUFReader(file).fields.items()}
    names = fields["tokenizer.ggml.tokens"]
    assert len(names) == len(set(names)) == 32_003
    # Of llama.cpp's converter at 0c1e570, as every other key but those that its docs make optional.
    assert fields["general.size_label"] == "4.2M"
    if kind == "chatml":
        ids = [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("unknown", "padding")]
        assert [names[i] for i in ids] == list(named.values())


def test_mistakes_and_what_was_there_stays(tmp_path):
    c, file = STORED["plain"], tmp_path / "x.gguf"
    arrays = weights(c)
    source = save_hugging_face(tmp_path / "hf", c, arrays)
    file.write_text("kept")
    (tmp_path / "new").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".x.gguf.0123abcd.partial").touch()  # of a killed process
    for flags, message in (
        ([f"--to={file}", "--format=gguf"], "exists already; name another file, or"),
        ([f"--to={tmp_path}", "--format=gguf"], "holds what is read"),
        ([f"--to={tmp_path}/new", "--format=gguf"], "is a directory; name a file"),
        (
            [f"--to={source}/model.safetensors", "--format=gguf", "--overwrite"],
            "which is read; name another",
        ),
        ([f"--to={tmp_path}/y", "--format=gguf", "--max_shard_bytes=9"], "max_shard_bytes is of"),
        ([f"--to={file}/deeper/y", "--format=gguf"], "x.gguf"),
        ([f"--to={tmp_path}/gone/y", "--format=gguf"], "y cannot be written: File exists"),
        ([f"--to={tmp_path}/new", "--dtype=q8_0"], "q8_0 is of GGUF files: add --format=gguf"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([f"--from={source}", *flags])
    arrays["lm_head.weight"][3, 3] = np.inf
    save_hugging_face(source, c, arrays)
    with pytest.raises(UserError, match=r"lm_head\.weight holds 1 values that are NaN or infinite"):
        write(source, file, "--overwrite")
    assert file.read_text() == "kept"
    assert [p.name for p in tmp_path.glob(".*")] == []
