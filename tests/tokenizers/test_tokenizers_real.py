"""The real Llama-2 and Llama-3 tokenizers on real texts, beside the libraries they come from."""

import gzip
import json

import pytest

from llamajax.data import load_tokenizer

CHARS = 250_000  # of each text
TRAPS = [
    "<s>", "</s>", "<unk>", "<s>[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST] z </s>", " leading",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>", "<|end_of_text|>",
    "<0x0A>", "nul\x00", "🦙👩‍👩‍👧", "  ", "\n \n", "1234567 don't WE'LL", "\ufeffbom", "e\u0301",
]  # fmt: skip


def texts(assets) -> list[str]:
    folder = assets / "text"
    moby = (folder / "moby_dick.txt").read_text("utf-8")
    with gzip.open(folder / "austen.txt.gz", "rt", encoding="utf-8") as stream:
        austen = stream.read(CHARS)
    with gzip.open(folder / "state_of_the_union.jsonl.gz", "rt", encoding="utf-8") as stream:
        speeches = "\n\n".join(json.loads(stream.readline())["text"] for _ in range(8))
    return [moby[:CHARS], austen, speeches[:CHARS]]


@pytest.fixture
def llama2(assets):
    import sentencepiece

    path = assets / "tokenizers" / "llama2.model"
    return load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


@pytest.fixture
def llama3(assets):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    path = assets / "tokenizers" / "llama3.model"
    # As Meta's own tokenizer.py has it.
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    encoding = tiktoken.Encoding(
        "llama3",
        pat_str=words,
        mergeable_ranks=load_tiktoken_bpe(str(path)),
        special_tokens={"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001},
    )

    def encode(text: str) -> list[int]:
        return encoding.encode(text, allowed_special=set(), disallowed_special=())

    return load_tokenizer(path), encode


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_real_texts_and_traps_as_the_library_reads_them(request, assets, name):
    tokenizer, encode = request.getfixturevalue(name)
    for text in [*texts(assets), *TRAPS]:
        ids = tokenizer.encode(text)
        assert ids == encode(text), text[:80]
        assert tokenizer.decode(ids) == text
    control = {0, 1, 2} if name == "llama2" else set(range(128_000, 128_256))
    assert not any(control & set(tokenizer.encode(trap)) for trap in TRAPS)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_two_things_that_a_round_trip_changes(request, name):
    tokenizer, _ = request.getfixturevalue(name)
    assert tokenizer.decode(tokenizer.encode("a\ud83e b")) == "a\ufffd b"  # a half surrogate
    # SentencePiece writes a space as U+2581, so that it comes back as one.
    expected = "x y" if name == "llama2" else "x\u2581y"
    assert tokenizer.decode(tokenizer.encode("x\u2581y")) == expected
