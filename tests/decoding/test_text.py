"""Text that comes token by token: whole characters, and nothing lost."""

import pytest

from llamajax.data import load_tokenizer
from llamajax.decoding.printed_texts import TextStream, decode_ids

TEXT = "naïve Straße 東京 😀👍🏽 — tab\there\n\n  two  spaces"


def pieces(tokenizer, prompt, ids) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.feed([i]) for i in ids), stream.finish()]


@pytest.mark.parametrize("name", ["byte", "llama2.model", "llama3.model"])
def test_pieces_are_whole_characters_and_join_to_the_text(name, request):
    path = name
    if name != "byte":
        path = request.getfixturevalue("assets") / "tokenizers" / name
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    prompt, new = [tokenizer.bos_id, *ids[:2]], [*ids[2:], tokenizer.eos_id]
    found = pieces(tokenizer, prompt, new)
    assert decode_ids(tokenizer, prompt) + "".join(found) == TEXT
    assert "\ufffd" not in "".join(found)
    assert sum(bool(piece) for piece in found) > 10
    assert "".join(pieces(tokenizer, [tokenizer.bos_id], ids)) == TEXT


def test_the_space_before_a_continuation_stays(assets):
    tokenizer = load_tokenizer(assets / "tokenizers" / "llama2.model")
    prompt, new = tokenizer.encode("Hello"), tokenizer.encode("world again")
    assert "".join(pieces(tokenizer, prompt, new)) == " world again"


def test_a_character_that_is_never_finished_comes_at_the_end():
    tokenizer = load_tokenizer("byte")
    half = list("é".encode())[:1]
    assert pieces(tokenizer, [256], [65, *half]) == ["A", "", "\ufffd"]
    assert pieces(tokenizer, [256], [*half, 65]) == ["", "\ufffdA", ""]


def test_ids_beyond_the_tokenizer_give_nothing():
    assert decode_ids(load_tokenizer("byte"), [65, 300, 66]) == "AB"


def test_ids_without_a_tokenizer():
    stream = TextStream(None, [3])
    assert [stream.feed(ids) for ids in ([7], [], [8, 9], [1])] == ["7", "", ",8,9", ",1"]
    assert stream.finish() == ""
