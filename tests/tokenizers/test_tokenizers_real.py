"""The real Llama 2 and Llama 3 tokenizers on real texts, beside the libraries they come from."""

import gzip
import json

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from llamajax.data import load_tokenizer
from llamajax.tokenizers.tokenizer_export import export_tokenizer

CHARS = 250_000  # of each text
TRAPS = [
    "<s>", "</s>", "<unk>", "<s>[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST] z </s>", " leading",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>", "<|end_of_text|>",
    "<0x0A>", "nul\x00", "🦙👩‍👩‍👧", "  ", "\n \n", "1234567 don't WE'LL", "\ufeffbom", "e\u0301",
]  # fmt: skip
# As Meta's own tokenizer.py has it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def texts(assets) -> list[str]:
    folder = assets / "text"
    moby = (folder / "moby_dick.txt").read_text("utf-8")
    with gzip.open(folder / "austen.txt.gz", "rt", encoding="utf-8") as stream:
        austen = stream.read(CHARS)
    with gzip.open(folder / "state_of_the_union.jsonl.gz", "rt", encoding="utf-8") as stream:
        speeches = "\n\n".join(json.loads(stream.readline())["text"] for _ in range(8))
    odd_lines = moby[:100_000].replace("\n\n", "\r\n \n\t\n")
    return [moby[:CHARS], austen, speeches[:CHARS], odd_lines, *TRAPS]


@pytest.fixture(params=["llama2", "llama3"])
def both(request, assets):
    """Our tokenizer, the library's `encode`, the ids of control tokens, and BOS and EOS."""
    path = assets / "tokenizers" / f"{request.param}.model"
    if request.param == "llama2":
        encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
        return load_tokenizer(path), encode, {0, 1, 2}, (1, 2)
    encoding = tiktoken.Encoding(
        "llama3", pat_str=WORDS, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )
    ends = (128_000, 128_001)
    return load_tokenizer(path), encoding.encode_ordinary, set(range(128_000, 128_256)), ends


def test_real_texts_and_traps_as_the_library_reads_them(both, texts):
    tokenizer, encode, control, _ = both
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encode(text), text[:80]
        assert tokenizer.decode(ids) == text
        assert not control & set(ids)


def test_known_ids_and_the_two_things_that_a_round_trip_changes(both):
    tokenizer, _, control, ends = both
    is_llama2 = tokenizer.kind == "sentencepiece"
    assert tokenizer.encode("Hello world") == ([15043, 3186] if is_llama2 else [9906, 1917])
    assert tokenizer.vocab_size == (32_000 if is_llama2 else max(control) + 1)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ends
    assert tokenizer.decode(tokenizer.encode("a\ud83e b")) == "a\ufffd b"  # a half surrogate
    # SentencePiece writes a space as U+2581, so that it comes back as one.
    assert tokenizer.decode(tokenizer.encode("x\u2581y")) == ("x y" if is_llama2 else "x\u2581y")


def test_texts_in_parts_of_any_size(both, texts, tmp_path, monkeypatch):
    """Also as tokenizer.json: neither a cut nor the fast engine for Llama 3's changes a token."""
    tokenizer, encode, *_ = both
    export_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    exported = load_tokenizer(tmp_path)
    if tokenizer.kind == "tiktoken":
        assert exported._encoder._fast is not None
        monkeypatch.setattr("llamajax.tokenizers.tokenizer_json._FAST_CHARS", 0)
        slow = exported._encoder._model.encode
        for text in texts:
            assert exported.encode(text) == encode(text) == slow(text, add_special_tokens=False).ids
        monkeypatch.undo()
    for size in (1, 300):
        for each in (exported, tokenizer) if tokenizer.kind == "sentencepiece" else (exported,):
            monkeypatch.setattr(each, "_part_chars", size)
            for text in texts:
                text = text[:40_000]
                assert max(map(len, each._parts(text))) < 1000
                assert each.encode(text) == encode(text), text[:80]
