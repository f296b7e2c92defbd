"""Added tokens and the ends of a text, for each form in which Hugging Face states them.

Expected values: transformers 5.24.0 with tokenizers 0.23.3 on the same files, 2026-11-29.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers.processors import Sequence, TemplateProcessing

from llamajax.data import load_tokenizer
from llamajax.errors import UserError
from llamajax.tokenizers.tokenizer_export import export_tokenizer
from llamajax.tokenizers.tokenizer_identity import (
    data_mismatch,
    load_recorded,
    matches_record,
    same_tokens,
    tokenizer_record,
)

SPECIALS = ["<|a|>", "<|b|>", "</s>", "<|endoftext|>", "<|im_end|>"]  # ids 258 to 262


def named(**names: object) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names}


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
def test_added_tokens_that_are_not_special_are_ordinary_ones(
    text, ids, tmp_path, byte_level, store
):
    model = byte_level(["<|bos|>"])
    model.add_tokens(["<think>", "</think>"])
    model.add_special_tokens(["<|eos|>"])  # leaves a hole among the others' ids
    model.add_tokens(["        ", "    "])
    store(tmp_path, model, tokenizer_config=named(bos_token="<|bos|>", eos_token="<|eos|>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([258, *ids, 261]) == text
    assert set(tokenizer.control_ids) == {"<|bos|>", "<|eos|>"}
    assert not {258, 261} & set(tokenizer.encode("<|bos|><|eos|>"))


LLAMA = {"model_type": "llama"}
A, B = {"content": "<|a|>"}, {"content": "<|b|>"}
FORMS = {  # files, BOS, all EOS
    "null BOS": ({"tokenizer_config": named(bos_token=None, eos_token="<|b|>")}, None, (259,)),
    "no BOS": ({"tokenizer_config": named(eos_token="<|b|>")}, None, (259,)),
    "objects": ({"tokenizer_config": named(bos_token=A, eos_token=B)}, 258, (259,)),
    "legacy": ({"special_tokens_map": {"bos_token": "<|a|>", "eos_token": B}}, 258, (259,)),
    "GPT-2": ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, 261, (261,)),
    "ids of the model": ({"config": LLAMA | {"bos_token_id": 258, "eos_token_id": 259}},
                         258, (259,)),
    "several EOS": ({"tokenizer_config": named(bos_token=A, eos_token=B),
                     "config": LLAMA | {"eos_token_id": [259, 262]}}, 258, (259, 262)),
    "generation": ({"tokenizer_config": named(bos_token=A, eos_token=B),
                    "config": LLAMA | {"eos_token_id": 259},
                    "generation_config": {"eos_token_id": [259, 262], "pad_token_id": 261}},
                   258, (259, 262)),
    "add_bos_token": ({"tokenizer_config": named(bos_token=A, eos_token=B, add_bos_token=False)},
                      258, (259,)),
    "add_eos_token": ({"tokenizer_config": named(bos_token=A, eos_token=B, add_eos_token=True)},
                      258, (259,)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_ends_of_a_text_in_every_form_and_from_every_writer(
    form, tmp_path, byte_level, store, export
):
    files, bos, stops = FORMS[form]
    tokenizer = load_tokenizer(store(tmp_path, byte_level(SPECIALS), **files))
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    for read in (tokenizer, load_tokenizer(tmp_path / "copy"), export(tokenizer)):
        assert (read.bos_id, read.eos_id, read.stop_ids) == (bos, stops[0], stops)
        assert read.start_ids == []  # as no post-processor says so
        assert read.facts.model.pad_id == (261 if form == "generation" else None)
        assert read.warnings == ()


@pytest.fixture(params=["llama2", "ranks"])
def model_file(request, assets, ranks) -> Path:
    """Llama 2's tokenizer.model, and one as Llama 3's."""
    return ranks if request.param == "ranks" else assets / "tokenizers" / "llama2.model"


def test_a_model_file_follows_add_bos_token(model_file, tmp_path, store, export):
    """As transformers does: its ids of "a" with True and False are [1, 263] and [263]."""
    shutil.copyfile(model_file, tmp_path / "tokenizer.model")
    both = []
    for add in (True, False):
        both.append(load_tokenizer(store(tmp_path, tokenizer_config={"add_bos_token": add})))
    assert [len(each.start_ids) for each in both] == [1, 0]
    assert not same_tokens(*both)
    exported = export(both[1])
    assert (exported.bos_id, exported.start_ids) == (both[0].bos_id, [])


BYTES = tokenizers.processors.ByteLevel(trim_offsets=False)
BOS = tokenizers.processors.TemplateProcessing(single="<|a|> $A", special_tokens=[("<|a|>", 258)])


@pytest.mark.parametrize("reader", ["library", pytest.param("live", marks=pytest.mark.live)])
@pytest.mark.parametrize("add", [None, False, True])
@pytest.mark.parametrize("processor", [None, BYTES, BOS, [BYTES, BOS]])
def test_a_tokenizer_json_decides_about_its_bos_itself(
    processor, add, reader, tmp_path, byte_level, store, request
):
    """As in transformers, which goes by the post-processor and reads no add_bos_token beside it."""
    model = byte_level(SPECIALS)
    if processor is not None:
        model.post_processor = processor if processor in (BYTES, BOS) else Sequence(processor)
    config = named(bos_token="<|a|>", eos_token="<|b|>")
    config |= {} if add is None else {"add_bos_token": add}
    tokenizer = load_tokenizer(store(tmp_path / "hf", model, tokenizer_config=config))
    adds = processor not in (None, BYTES)
    assert tokenizer.start_ids == ([258] if adds else [])
    assert len(tokenizer.warnings) == (add is not None and add != adds)
    (tmp_path / "export").mkdir()
    export_tokenizer(tokenizer, tmp_path / "export")
    for folder in (tmp_path / "hf", tmp_path / "export"):
        if reader == "library":
            ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a b").ids
        else:
            theirs = request.getfixturevalue(reader).transformers.AutoTokenizer
            ids = theirs.from_pretrained(folder).encode("a b")
        assert ids == [*tokenizer.start_ids, *tokenizer.encode("a b")]


@pytest.mark.parametrize("processor", [None, BYTES])
def test_data_and_runs_of_before_go_on_with_the_bos_that_they_have(
    processor, tmp_path, byte_level, store
):
    """Earlier versions began texts with it, whatever the post-processor said."""
    model = byte_level(SPECIALS)
    if processor is not None:
        model.post_processor = processor
    folder = store(tmp_path / "data", model, tokenizer_config=named(bos_token=A, eos_token=B))
    content = (folder / "tokenizer.json").read_bytes()
    facts = json.dumps(["huggingface", 258, 259]).encode()
    record = {"fingerprint": hashlib.sha256(facts + b"\n" + content).hexdigest(), "probe": ""}
    assert load_recorded(folder, record, of=Path("7")).start_ids == [258]
    store(folder, manifest={"tokenizer": {"file": "tokenizer.json", **record}})
    tokenizer = load_tokenizer(folder)
    # Workers of prepare name the file.
    assert tokenizer.start_ids == load_tokenizer(folder / "tokenizer.json").start_ids == [258]
    (tmp_path / "export").mkdir()
    export_tokenizer(tokenizer, tmp_path / "export")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    assert library.encode("a b", "c").ids == [258, 64, 220, 65, 258, 66]
    assert matches_record(load_tokenizer(tmp_path / "export"), tokenizer_record(tokenizer))


def test_data_without_the_bos_of_a_run_is_refused_with_a_tokenizer_that_has_it(
    tmp_path, byte_level, store
):
    model = byte_level(SPECIALS)
    new = load_tokenizer(store(tmp_path, model, tokenizer_config=named(bos_token=A, eos_token=B)))
    old = load_tokenizer(tmp_path)
    old.special, old.fingerprint = dataclasses.replace(old.special, adds_bos=True), ""
    with_bos, file = data_mismatch("--data=x", new, old, new.file), f"--tokenizer={new.file}"
    assert "no BOS before texts) than" in with_bos
    assert "--tokenizer=DIR" in with_bos
    assert file not in with_bos  # it gives the refused tokens again
    assert file in data_mismatch("--data=x", old, new, new.file)


def test_texts_begin_with_bos_where_the_vocabulary_lacks_latin_letters(tmp_path, store):
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"C": 0, "G": 1}, []))
    model.add_special_tokens(["<s>", "</s>"])
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = load_tokenizer(store(tmp_path, model))
    assert (tokenizer.start_ids, tokenizer.eos_id) == ([2], 3)


def test_one_token_at_both_ends_is_the_last_resort_and_named(tmp_path, byte_level, store):
    tokenizer = load_tokenizer(store(tmp_path, byte_level(["<|endoftext|>"])))
    assert tokenizer.bos_id == tokenizer.eos_id == 258
    assert "<|endoftext|> is BOS and EOS, for want of another" in tokenizer.warnings[0]


def test_a_bare_tokenizer_json_that_we_exported(model_file, tmp_path, export):
    original = load_tokenizer(model_file)
    export(original)
    shutil.copy(tmp_path / "export" / "tokenizer.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert (bare.bos_id, bare.eos_id, bare.warnings) == (original.bos_id, original.eos_id, ())


def test_ranks_without_a_bos_are_exported(ranks, tmp_path, store, export):
    shutil.copyfile(ranks, tmp_path / "tokenizer.model")
    store(tmp_path, tokenizer_config=named(bos_token=None, eos_token="<|end_of_text|>"))
    tokenizer = load_tokenizer(tmp_path)
    exported = export(tokenizer)
    assert (exported.bos_id, exported.eos_id) == (None, tokenizer.eos_id)
    spec = tokenizers.Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    assert spec.encode("Hello there").ids == tokenizer.encode("Hello there")


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_chatml_on_llama_2(form, assets, tmp_path, store, export):
    shutil.copyfile(assets / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001, "<think>": 32002, "</think>": 32003}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if form == "added_tokens.json":
        store(tmp_path, added_tokens=added, tokenizer_config=config)
    else:
        decoder = {i: {"content": n, "special": "im" in n} for n, i in added.items()}
        store(tmp_path, tokenizer_config=config | {"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(tmp_path)
    exported = export(tokenizer, num_warnings=1)
    for each in (tokenizer, exported):
        assert (each.bos_id, each.eos_id, each.vocab_size) == (1, 32000, 32004)
        assert each.control_ids["<|im_start|>"] == 32001
    for text, ids in [
        ("Hello<think>a b</think> c", [15043, 32002, 29874, 289, 32003, 274]),
        ("<think>x", [32002, 29916]),
        ("a <think> b", [263, 29871, 32002, 289]),
    ]:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([1, *ids, 32000]) == text
    assert not {1, 32000, 32001} & set(tokenizer.encode("<s><|im_start|>user<|im_end|>"))
    spec = tokenizers.Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    for text in ("Hello<think>", "a <think></think>", "<think>", "Hello<think></think><think>"):
        assert spec.encode(text).ids == [1, *tokenizer.encode(text)]
    assert same_tokens(tokenizer, exported)
    assert same_tokens(exported, tokenizer)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_tokenizers_that_number_an_added_token_differently_are_two(
    special, beside, tmp_path, byte_level, store
):
    both = []
    for names in (["<x>", "<y>"], ["<y>", "<x>"]):
        model = byte_level(["<|bos|>", "<|eos|>"])
        config = named(bos_token="<|bos|>", eos_token="<|eos|>")
        if beside:
            tokens = {260 + i: {"content": n, "special": special} for i, n in enumerate(names)}
            config |= {"added_tokens_decoder": tokens}
        else:
            model.add_tokens([tokenizers.AddedToken(name, special=special) for name in names])
        both.append(load_tokenizer(store(tmp_path / names[0], model, tokenizer_config=config)))
    one, other = both
    assert same_tokens(one, one)
    assert not same_tokens(one, other)
    old = {key: value for key, value in tokenizer_record(other).items() if key != "tokens"}
    assert matches_record(one, old)  # of an older checkpoint


def test_padding_beyond_the_model_counts_for_nothing(assets, tmp_path, store):
    """Llama 2 is published with `<pad>` as token 32000, and 32000 rows of the embedding."""
    shutil.copyfile(assets / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(store(tmp_path, added_tokens={"<pad>": 32000}))
    assert tokenizer.vocab_size == 32000
    assert max(tokenizer.encode("a <pad> b")) < 32000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": [[2]]}}, r"generation_config.*\[2\].*token id or"),
        ({"added_tokens": {"x": "y"}}, r"added_tokens.*malformed"),
        ({"special_tokens_map": []}, r"special_tokens_map.*a list, not an object"),
        ({"added_tokens": {"<x>": 263, "<y>": 265}}, r"\[263, 265\].*follow the 263 tokens"),
    ],
)
def test_malformed_or_foreign_files_beside_a_tokenizer(files, message, tmp_path, byte_level, store):
    store(tmp_path, byte_level(SPECIALS), **files)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
