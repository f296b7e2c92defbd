"""Tokenizers: known ids, round trips, no control token out of a text, clear refusals."""

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from llamajax.data import load_tokenizer
from llamajax.errors import UserError
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
    from llamajax.corpus.holdout import Part
    from llamajax.corpus.tokenizer_training import train_tokenizer

    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    text = "\n".join(
        f"The {w} fox, number {i}, said: «{w}s»" for i, w in enumerate(["red", "old"] * 99)
    )
    train_tokenizer([Part("train", text)], num_pieces=335, share=1.0, output=path)
    return path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    merged = [b"th", b"the", b" t", b"<s", b"<s>"]
    tokens = [bytes([b]) for b in range(256)] + merged
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
    path.write_text("".join(lines))
    return path


def byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE as Llama-3's tokenizer.json has it, `<s>` spelled by merges included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "<s", "<s>"])}
    model = models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")], ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def store(tokenizer: tokenizers.Tokenizer, directory: Path, config: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    return store(byte_level(["<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>"]), directory)


KINDS = ["byte", "trained", "ranks", "hugging_face", "llama2", "llama3"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest):
    name = request.param
    if name in ("llama2", "llama3"):
        folder = request.getfixturevalue("assets")
        return load_tokenizer(folder / "tokenizers" / f"{name}.model")
    return load_tokenizer("byte" if name == "byte" else request.getfixturevalue(name))


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


@pytest.mark.parametrize(
    ("name", "ids", "vocab_size", "ends"),
    [
        ("llama2", [15043, 3186], 32_000, (1, 2)),
        ("llama3", [9906, 1917], 128_256, (128_000, 128_001)),
    ],
)
def test_the_real_ones(assets, name, ids, vocab_size, ends):
    tokenizer = load_tokenizer(assets / "tokenizers" / f"{name}.model")
    assert tokenizer.encode("Hello world") == ids
    assert (tokenizer.vocab_size, (tokenizer.bos_id, tokenizer.eos_id)) == (vocab_size, ends)


def test_llama2_line_by_line_gives_the_tokens_of_the_whole(assets):
    import sentencepiece

    path = assets / "tokenizers" / "llama2.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")[:100_000]
    text = text.replace("\n\n", "\r\n \n\t\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer._line_start == 1
    assert tokenizer.encode(text) == model.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama3_equals_tiktoken_where_nothing_is_cut(assets):
    tokenizer = load_tokenizer(assets / "tokenizers" / "llama3.model")
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")[:50_000]
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


@pytest.mark.parametrize("name", ["ranks", "trained", "hugging_face"])
def test_texts_without_a_space_end_in_time(request, name):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    for text in ("x" * 1_000_001, " " * 1_000_001):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_runs_are_cut():
    assert cut_long_runs("abc", 3) == ["abc"]
    pieces = cut_long_runs("ab  cdefgh    ij", 3)
    assert "".join(pieces) == "ab  cdefgh    ij"
    assert pieces == ["ab  cde", "fgh   ", " ij"]
    assert cut_long_runs("abcdefg", 3) == ["abc", "def", "g"]


def test_hugging_face_control_words_in_the_vocabulary_are_out_of_reach(tmp_path):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(c, -5.0) for c in "▁<>/sunkab"]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<s>", "</s>"])
    tokenizer = load_tokenizer(store(model, tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("a<s></s>b")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a<s></s>b"


def test_hugging_face_ends_from_config_template_names_or_not_at_all(tmp_path):
    def ends(model, name, config=None):
        tokenizer = load_tokenizer(store(model, tmp_path / name, config))
        return [model.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id)]

    model = byte_level(["<a>", "<b>", "</s>", "<|endoftext|>"])
    config = {"bos_token": {"content": "<a>"}, "eos_token": "<b>"}
    assert ends(model, "config", config) == ["<a>", "<b>"]
    assert ends(byte_level(["<|endoftext|>"]), "gpt2") == ["<|endoftext|>"] * 2
    model.post_processor = processors.TemplateProcessing(
        single="<b> $A <a>", special_tokens=[("<a>", model.token_to_id("<a>")),
                                             ("<b>", model.token_to_id("<b>"))],
    )  # fmt: skip
    assert ends(model, "template") == ["<b>", "<a>"]
    with pytest.raises(UserError, match=r"no BOS or EOS token found.*<sep>"):
        load_tokenizer(store(byte_level(["<sep>"]), tmp_path / "none"))
    bad = store(model, tmp_path / "bad")
    bad.with_name("tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(bad)


def test_fingerprints_tell_tokenizers_apart(trained, ranks, hugging_face, tmp_path):
    paths = ["byte", trained, ranks, hugging_face]
    assert len({load_tokenizer(p).fingerprint for p in paths}) == 4
    config = {"bos_token": "</s>", "eos_token": "<s>"}
    other = store(tokenizers.Tokenizer.from_file(str(hugging_face)), tmp_path, config)
    assert load_tokenizer(other).fingerprint != load_tokenizer(hugging_face).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.model", b"\x00\x01garbage", "neither a SentencePiece model nor"),
        ("t.model", b"", "neither a SentencePiece model nor"),
        ("t.model", b"YQ== 0\nnot base64!\n", "t.model:2: not a line of base64"),
        ("t.model", b"YQ== 0\nYg== 1\n", "over all 256 bytes"),
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("manifest.json", b"{}", "damaged"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path if name == "manifest.json" else tmp_path / name)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"only llamajax\.prepare trains"):
        load_tokenizer("train:100")


def test_training_reads_lines_that_sentencepiece_passes_over(tmp_path):
    """Lines over its limit of 1 MiB and with U+2585 are learned from."""
    from llamajax.corpus.holdout import Part
    from llamajax.corpus.tokenizer_training import train_tokenizer

    long = " ".join(["abracadabra"] * 100_000)
    plain = "\n".join(f"line {i} of the text that is short" for i in range(200))
    marked = "\n".join(f"zyzzyva {i} \u2585 zyzzyva" for i in range(200))
    parts = [Part("train", text) for text in (long, plain, marked, "half \ud83d surrogate")]
    train_tokenizer(parts, num_pieces=360, share=1.0, output=tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer.encode("abracadabra")) == 1
    assert len(tokenizer.encode("zyzzyva")) == 1


def user_model(path: Path, **settings: object) -> Path:
    import sentencepiece

    lines = [f"a {w} b number {i} says hello" for i, w in enumerate(["red", "old"] * 99)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path), minloglevel=2, **settings
    )
    return path.with_suffix(".model")


def test_a_word_model_reads_long_texts_as_its_library_does(tmp_path):
    import sentencepiece

    path = user_model(tmp_path / "w", model_type="word", vocab_size=30)
    text = ("a red b\nnumber old  \n says hello red\n\n" * 100)[:-1]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert load_tokenizer(path).encode(text) == model.encode(text)


def test_a_model_that_loses_newlines_is_named(tmp_path, trained):
    lossy = load_tokenizer(user_model(tmp_path / "l", model_type="bpe", vocab_size=60))
    assert "loses newlines ('a\\nb' comes back as" in lossy.warnings[0]
    assert load_tokenizer(trained).warnings == ()
