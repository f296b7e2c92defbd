"""Added tokens and the ends of a text, for each form in which Hugging Face states them.

Expected values: transformers 5.24.0 with tokenizers 0.23.3 on the same files, 2026-11-29.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from llamajax import prepare
from llamajax.data import load_tokenizer
from llamajax.errors import UserError
from llamajax.tokenizers.chat import encode_chat
from llamajax.tokenizers.tokenizer import Tokenizer
from llamajax.tokenizers.tokenizer_export import export_tokenizer
from llamajax.tokenizers.tokenizer_identity import matches_record, same_tokens, tokenizer_record

SPECIALS = ["<|a|>", "<|b|>", "</s>", "<|endoftext|>", "<|im_end|>"]  # ids 258 to 262


def byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "<s", "<s>"])}
    model = models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")], ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def write(directory: Path, **files: dict) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), "utf-8")


def generic(**named: object) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<think>a</think>", [259, 64, 260]),
        ("def f(x):\n        return x",
         [67, 68, 69, 220, 69, 7, 87, 8, 25, 198, 262, 81, 68, 83, 84, 81, 77, 220, 87]),
        ("    \n", [263, 198]),
        ("x <think>  y", [87, 220, 259, 220, 220, 88]),
    ],
)  # fmt: skip
def test_added_tokens_that_are_not_special_are_ordinary_ones(text, ids, tmp_path):
    model = byte_level(["<|bos|>"])
    model.add_tokens(["<think>", "</think>"])
    model.add_special_tokens(["<|eos|>"])  # leaves a hole among the others' ids
    model.add_tokens(["        ", "    "])
    model.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=generic(bos_token="<|bos|>", eos_token="<|eos|>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([258, *ids, 261]) == text
    assert set(tokenizer.control_ids) == {"<|bos|>", "<|eos|>"}
    assert not {258, 261} & set(tokenizer.encode("<|bos|><|eos|>"))


LLAMA = {"model_type": "llama"}
FORMS = {
    "null BOS": ({"tokenizer_config": generic(bos_token=None, eos_token="<|b|>")}, None, 259),
    "no BOS": ({"tokenizer_config": generic(eos_token="<|b|>")}, None, 259),
    "objects": (
        {"tokenizer_config": generic(bos_token={"content": "<|a|>"},
                                     eos_token={"content": "<|b|>"})}, 258, 259,
    ),
    "special_tokens_map": (
        {"special_tokens_map": {"bos_token": "<|a|>", "eos_token": {"content": "<|b|>"}}}, 258, 259,
    ),
    "GPT-2": ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, 261, 261),
    "bare, ids of the model": (
        {"config": LLAMA | {"bos_token_id": 258, "eos_token_id": 259}}, 258, 259,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_ends_of_a_text_in_every_form(form, tmp_path):
    files, bos, eos = FORMS[form]
    byte_level(SPECIALS).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **files)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.warnings) == (bos, eos, ())
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.bos_id, copy.eos_id, copy.stop_ids) == (bos, eos, tokenizer.stop_ids)
    (tmp_path / "export").mkdir()
    export_tokenizer(tokenizer, tmp_path / "export")
    exported = load_tokenizer(tmp_path / "export")
    assert (exported.bos_id, exported.eos_id) == (bos, eos)


@pytest.mark.parametrize(
    ("files", "stop_ids"),
    [
        ({"config": LLAMA | {"eos_token_id": [259, 262]}}, (259, 262)),
        ({"config": LLAMA | {"eos_token_id": 259},
          "generation_config": {"eos_token_id": [259, 262], "pad_token_id": 261}}, (259, 262)),
        ({}, (259,)),
    ],
)  # fmt: skip
def test_every_eos_survives_each_writer(files, stop_ids, tmp_path):
    byte_level(SPECIALS).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=generic(bos_token="<|a|>", eos_token="<|b|>"), **files)
    for write_to in (Tokenizer.save, export_tokenizer):
        target = tmp_path / write_to.__name__
        target.mkdir()
        write_to(load_tokenizer(tmp_path), target)
        copy = load_tokenizer(target)
        assert copy.stop_ids == stop_ids
        assert copy.facts.model.pad_id == files.get("generation_config", {}).get("pad_token_id")


def test_one_token_at_both_ends_is_the_last_resort_and_said(tmp_path):
    byte_level(["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == 258
    assert "<|endoftext|> begins and ends every text" in tokenizer.warnings[0]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_bare_tokenizer_json_that_we_exported(name, assets, tmp_path):
    original = load_tokenizer(assets / "tokenizers" / f"{name}.model")
    export_tokenizer(original, tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    bare = load_tokenizer(tmp_path)
    assert (bare.bos_id, bare.eos_id, bare.warnings) == (original.bos_id, original.eos_id, ())


def test_ranks_without_a_bos_are_exported(assets, tmp_path):
    shutil.copyfile(assets / "tokenizers" / "llama3.model", tmp_path / "tokenizer.model")
    write(tmp_path, tokenizer_config=generic(bos_token=None, eos_token="<|end_of_text|>"))
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "export").mkdir()
    assert export_tokenizer(tokenizer, tmp_path / "export") == []
    exported = load_tokenizer(tmp_path / "export")
    assert (exported.bos_id, exported.eos_id) == (None, 128001)
    spec = tokenizers.Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    assert spec.encode("Hello there").ids == tokenizer.encode("Hello there")


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_chatml_on_llama_2(form, assets, tmp_path):
    shutil.copyfile(assets / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001, "<think>": 32002, "</think>": 32003}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if form == "added_tokens.json":
        write(tmp_path, added_tokens=added, tokenizer_config=config)
    else:
        decoder = {i: {"content": n, "special": "im" in n} for n, i in added.items()}
        write(tmp_path, tokenizer_config=config | {"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 32000, 32004)
    for text, ids in [
        ("Hello<think>a b</think> c", [15043, 32002, 29874, 289, 32003, 274]),
        ("<think>x", [32002, 29916]),
        ("a <think> b", [263, 29871, 32002, 289]),
    ]:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([1, *ids, 32000]) == text
    assert not {1, 32000, 32001} & set(tokenizer.encode("<s><|im_start|>user<|im_end|>"))
    assert tokenizer.control_ids["<|im_start|>"] == 32001
    export = tmp_path / "export"
    export.mkdir()
    export_tokenizer(tokenizer, export)
    exported = load_tokenizer(export)
    assert (exported.bos_id, exported.eos_id, exported.vocab_size) == (1, 32000, 32004)
    assert exported.control_ids["<|im_start|>"] == 32001
    spec = tokenizers.Tokenizer.from_file(str(export / "tokenizer.json"))
    for text in ("Hello<think>", "a <think></think>", "<think>", "Hello<think></think><think>"):
        assert spec.encode(text).ids == [1, *tokenizer.encode(text)]
    assert same_tokens(tokenizer, exported)
    assert same_tokens(exported, tokenizer)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_tokenizers_that_number_an_added_token_differently_are_two(special, beside, tmp_path):
    both = []
    for names in (["<x>", "<y>"], ["<y>", "<x>"]):
        path = tmp_path / names[0]
        path.mkdir()
        model = byte_level(["<|bos|>", "<|eos|>"])
        config = generic(bos_token="<|bos|>", eos_token="<|eos|>")
        if beside:
            tokens = {260 + i: {"content": n, "special": special} for i, n in enumerate(names)}
            config |= {"added_tokens_decoder": tokens}
        else:
            model.add_tokens([tokenizers.AddedToken(name, special=special) for name in names])
        model.save(str(path / "tokenizer.json"))
        write(path, tokenizer_config=config)
        both.append(load_tokenizer(path))
    one, other = both
    assert same_tokens(one, one)
    assert not same_tokens(one, other)
    old = {key: value for key, value in tokenizer_record(other).items() if key != "tokens"}
    assert matches_record(one, old)  # of an older checkpoint


def test_padding_beyond_the_model_counts_for_nothing(assets, tmp_path):
    """Llama 2 is published with `<pad>` as token 32000, and 32000 rows of the embedding."""
    shutil.copyfile(assets / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    write(tmp_path, added_tokens={"<pad>": 32000})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32000
    assert max(tokenizer.encode("a <pad> b")) < 32000


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi there\n"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "2+2?"},
]
# Of transformers' apply_chat_template(CHAT, add_generation_prompt=True) with the template that we
# write (of this sha256): the ids.
IDS = {
    "llama2": ("7c250c75082e0106", [
        1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829,
        14816, 29903, 6778, 13, 13, 29871, 6324, 727, 518, 29914, 25580, 29962, 15043, 29991,
        29871, 2, 1, 518, 25580, 29962, 29871, 29906, 29974, 29906, 29973, 518, 29914, 25580,
        29962,
    ], (2,)),
    "llama3": ("54112a6f3c2906f6", [
        128000, 128006, 9125, 128007, 271, 3513, 10015, 13, 128009, 128006, 882, 128007, 271,
        13347, 1070, 128009, 128006, 78191, 128007, 271, 9906, 0, 128009, 128006, 882, 128007,
        271, 17, 10, 17, 30, 128009, 128006, 78191, 128007, 271,
    ], (128001, 128009)),
    "chatml": ("f0ccc12278f1261f", [
        261, 82, 88, 82, 83, 68, 76, 198, 33, 68, 220, 65, 81, 72, 68, 69, 13, 260, 198, 261,
        84, 82, 68, 81, 198, 220, 220, 39, 72, 220, 83, 71, 68, 81, 68, 198, 260, 198, 261, 64,
        82, 82, 72, 82, 83, 64, 77, 83, 198, 220, 39, 68, 75, 75, 78, 0, 220, 260, 198, 261, 84,
        82, 68, 81, 198, 17, 10, 17, 30, 260, 198, 261, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198,
    ], (258, 260)),
}  # fmt: skip


@pytest.mark.parametrize("template", IDS)
def test_a_template_that_was_trained_on_is_exported(template, assets, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    byte_level([*SPECIALS[2:], "<|im_start|>"]).save(str(base / "tokenizer.json"))
    write(base, tokenizer_config=generic(bos_token=None, eos_token="</s>"))
    path = base if template == "chatml" else assets / "tokenizers" / f"{template}.model"
    lines = [{"messages": [*CHAT, {"role": "assistant", "content": "4"}]}] * 30
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = [f"--input={tmp_path / 'chat.jsonl'}", "--format=instructions", "--workers=1"]
    args += [f"--tokenizer={path}", f"--chat_template={template}", f"--output={tmp_path / 'out'}"]
    assert prepare.main(args) == 0
    export = tmp_path / "export"
    export.mkdir()
    export_tokenizer(load_tokenizer(tmp_path / "out"), export)
    text = (export / "chat_template.jinja").read_bytes()
    tokenizer = load_tokenizer(export)
    digest, ids, stop_ids = IDS[template]
    assert encode_chat(tokenizer, template, CHAT) == ids
    assert hashlib.sha256(text).hexdigest()[:16] == digest
    assert tokenizer.stop_ids == stop_ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": [[2]]}}, r"generation_config.*\[2\].*token id or"),
        ({"added_tokens": {"x": "y"}}, r"added_tokens.*malformed"),
        ({"special_tokens_map": []}, r"special_tokens_map.*a list, not an object"),
        ({"added_tokens": {"<x>": 263, "<y>": 265}}, r"\[263, 265\].*follow the 263 tokens"),
    ],
)
def test_malformed_or_foreign_files_beside_a_tokenizer(files, message, tmp_path):
    byte_level(SPECIALS).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
