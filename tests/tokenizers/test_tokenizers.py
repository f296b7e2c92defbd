"""Tokenizers: round trips, no control token out of a text, clear refusals."""

import itertools
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from llamajax.corpus.holdout import DocumentPart
from llamajax.corpus.tokenizer_training import train_tokenizer
from llamajax.data import load_tokenizer
from llamajax.errors import UserError
from llamajax.tokenizers.byte_level import proven_encoding
from llamajax.tokenizers.tiktoken_ranks import cut_long_runs

CONTROL = (
    "<s> </s> <unk> <s>x</s><|begin_of_text|><|end_of_text|><|endoftext|><|eot_id|><0x0A> [UNK]"
    "<|reserved_special_token_0|>"
)
TRICKY = [
    "", " ", "a", " leading", "   three spaces", "trailing  ", "\n", "\n\n\n", "a\n\nb\n",
    "\t\ttabs\t",
    "CRLF\r\nline\r\n\rend", "nul\x00inside\x00", "emoji 🦙🎉👩‍👩‍👧", "Ünïcödé ß 日本語 العربية",
    "e\u0301 not é",
    "\u00a0\u2003wide\u3000spaces", "\ufeffbom", "1234567890 3.14", "it's WE'LL don't", CONTROL,
    "x" * 3000, "line one\n  line two\n\n" * 300, "\U0010ffff\ufdd0",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    text = "\n".join(
        f"The {w} fox, number {i}, said: «{w}s»" for i, w in enumerate(["red", "old"] * 99)
    )
    train_tokenizer([DocumentPart("train", text)], num_pieces=335, share=1.0, output=path)
    return path


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory, byte_level, store) -> Path:
    model = byte_level(["<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>"])
    return store(tmp_path_factory.mktemp("hf"), model)


@pytest.fixture(params=["byte", "trained", "ranks", "hugging_face", "llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest):
    if request.param in ("llama2", "llama3"):
        folder = request.getfixturevalue("assets") / "tokenizers"
        return load_tokenizer(folder / f"{request.param}.model")
    return load_tokenizer(
        "byte" if request.param == "byte" else request.getfixturevalue(request.param)
    )


def test_round_trips_without_control_tokens(tokenizer):
    control = {tokenizer.bos_id, tokenizer.eos_id}
    if tokenizer.kind == "tiktoken":
        control |= set(range(tokenizer.vocab_size - 256, tokenizer.vocab_size))
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert not control & set(ids), text
    assert tokenizer.bos_id < tokenizer.vocab_size > tokenizer.eos_id


def test_control_tokens_and_half_surrogates_decode_to_something_harmless(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(tokenizer.encode("a\ud83eb")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd99")) == "🦙"
    with pytest.raises(UserError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_saved_copy_is_the_same_tokenizer(tokenizer, tmp_path):
    name = tokenizer.save(tmp_path)
    for path in (tmp_path / name, tmp_path):
        copy = load_tokenizer(path)
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("Hello world") == tokenizer.encode("Hello world")


def test_a_continuation_reads_on(tokenizer):
    for text in ("foo", " foo", "  foo", "\nfoo", "", " ", "ü\n \n", "1", "x\n" * 1500):
        ids = tokenizer.encode("A prompt:") + tokenizer.encode_continuation(text)
        assert tokenizer.decode(ids) == "A prompt:" + text


@pytest.mark.parametrize("name", ["ranks", "trained", "hugging_face"])
def test_texts_without_a_space_end_in_time(request, name):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    for text in ("x" * 1_000_001, " " * 1_000_001):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_runs_are_cut_wherever_they_begin():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("ab \n") * rng.choice((1, 2, 9)) for _ in range(12))
        runs = re.finditer(r"\s+|\S+", text)
        cuts = [0, *(c for run in runs for c in range(run.start() + 4, run.end(), 4)), len(text)]
        assert cut_long_runs(text, 4) == [text[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("name", ["byte", "trained", "hugging_face"])
def test_a_cut_changes_no_token(name, request, monkeypatch):
    tokenizer = load_tokenizer("byte" if name == "byte" else request.getfixturevalue(name))
    text = " ".join(TRICKY)
    whole = tokenizer.encode(text)
    for size in (1, 50):
        monkeypatch.setattr(tokenizer, "_part_chars", size)
        assert len(list(tokenizer._parts(text))) > 50 / size
        assert tokenizer.encode(text) == whole


def test_tiktoken_is_taken_only_where_it_is_proven_equal(ranks, export, tmp_path):
    tokenizer = export(load_tokenizer(ranks))
    spec = tokenizer._encoder._spec
    text = "the <s> thethe  \n\n 1234 don't ſ " * 9
    assert proven_encoding(spec).encode_ordinary(text) == tokenizer.encode(text)
    model, split = spec["model"], spec["pre_tokenizer"]["pretokenizers"]
    assert len(model["merges"]) > 4
    other_words = split[0] | {"pattern": {"Regex": r"\s+|\S+"}}
    for change in (
        {"model": model | {"merges": model["merges"][::-1]}},
        {"model": model | {"merges": model["merges"][1:]}},
        {"model": model | {"ignore_merges": False}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": spec["pre_tokenizer"] | {"pretokenizers": [other_words, split[1]]}},
    ):
        assert proven_encoding(spec | change) is None


def test_hugging_face_control_words_in_the_vocabulary_are_out_of_reach(tmp_path, store):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(c, -5.0) for c in "▁<>/sunkab"]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<s>", "</s>"])
    tokenizer = load_tokenizer(store(tmp_path, model))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("a<s></s>b")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a<s></s>b"


def test_hugging_face_ends_from_the_template_or_not_at_all(tmp_path, byte_level, store):
    model = byte_level(["<a>", "<b>", "</s>", "<|endoftext|>"])  # ids 258 and 259
    model.post_processor = processors.TemplateProcessing(
        single="<b> $A <a>", special_tokens=[("<a>", 258), ("<b>", 259)]
    )
    tokenizer = load_tokenizer(store(tmp_path / "template", model))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (259, 258)
    with pytest.raises(UserError, match=r"no BOS or EOS token found.*<sep>"):
        load_tokenizer(store(tmp_path / "none", byte_level(["<sep>"])))
    (store(tmp_path / "bad", model) / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load_tokenizer(tmp_path / "bad")


def test_fingerprints_tell_tokenizers_apart(trained, ranks, hugging_face, tmp_path, store):
    model = tokenizers.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    config = {"bos_token": "</s>", "eos_token": "<s>"}
    other = store(tmp_path, model, tokenizer_config=config)
    paths = ["byte", trained, ranks, hugging_face, other]
    assert len({load_tokenizer(p).fingerprint for p in paths}) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.model", b"\x00\x01garbage", "neither a SentencePiece model nor"),
        ("t.model", b"", "neither a SentencePiece model nor"),
        ("t.model", b"YQ== 0\nnot base64!\n", "t.model:2: not a line of base64"),
        ("t.model", b"YQ== 0\nYg== 1\n", "over all 256 bytes"),
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("manifest.json", b"{}", "damaged"),
        ("readme.txt", b"", r"no tokenizer\.json"),
        ("none.model", None, "no such file"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path if name in ("manifest.json", "readme.txt") else tmp_path / name)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b.replace(b"fox", b"\xff" * 3)])
def test_a_damaged_sentencepiece_model(trained, change, tmp_path):
    (tmp_path / "t.model").write_bytes(change(trained.read_bytes()))
    with pytest.raises(UserError, match="nor a tiktoken rank file, or damaged"):
        load_tokenizer(tmp_path / "t.model")


def test_only_prepare_trains_a_tokenizer():
    with pytest.raises(UserError, match=r"only llamajax\.prepare trains"):
        load_tokenizer("train:100")


def test_training_reads_lines_that_sentencepiece_skips(tmp_path):
    """Lines over its limit of 1 MiB and with U+2585 are learned from."""
    long = " ".join(["abracadabra"] * 100_000)
    plain = "\n".join(f"line {i} of the text that is short" for i in range(200))
    marked = "\n".join(f"zyzzyva {i} \u2585 zyzzyva" for i in range(200))
    parts = [DocumentPart("train", text) for text in (long, plain, marked, "half \ud83d surrogate")]
    train_tokenizer(parts, num_pieces=360, share=1.0, output=tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer.encode("abracadabra")) == 1
    assert len(tokenizer.encode("zyzzyva")) == 1


def user_model(path: Path, **settings: object) -> Path:
    lines = [f"a {w} b number {i} says hello" for i, w in enumerate(["red", "old"] * 99)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path), minloglevel=2, **settings
    )
    return path.with_suffix(".model")


def test_a_word_model_reads_long_texts_as_its_library_does(tmp_path):
    path = user_model(tmp_path / "w", model_type="word", vocab_size=30)
    text = ("a red b\nnumber old  \n says hello red\n\n" * 100)[:-1]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert load_tokenizer(path).encode(text) == model.encode(text)


def test_a_model_that_loses_newlines_is_named(tmp_path, trained):
    lossy = load_tokenizer(user_model(tmp_path / "l", model_type="bpe", vocab_size=60))
    assert "loses newlines ('a\\nb' comes back as" in lossy.warnings[0]
    assert load_tokenizer(trained).warnings == ()
