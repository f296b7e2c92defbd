"""What is held out: never nothing, never everything, near the fraction asked for."""

import pytest

from llamajax.corpus.holdout import Holdout
from llamajax.errors import UserError


def split(texts: list[str], fraction: float) -> dict[str, list[str]]:
    parts = list(Holdout(map(len, texts), fraction).split(iter(texts)))
    parts = [(part.split, "".join(part.document)) for part in parts]
    return {s: [text for split, text in parts if split == s] for s in ("train", "validation")}


@pytest.mark.parametrize("count", [1000, 2345])
def test_many_documents_are_drawn_from_each_group(count):
    texts = [f"document {i}" for i in range(count)]
    found = split(texts, 0.01)
    assert abs(len(found["validation"]) - count / 100) <= 10
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    numbers = [int(t.split()[1]) for t in found["validation"]]
    assert numbers != list(range(numbers[0], count, 100))  # not every hundredth


def test_more_documents_leave_the_earlier_ones_where_they_are():
    texts = [f"document {i}" for i in range(3000)]
    short, long = split(texts[:2000], 0.01), split(texts, 0.01)
    assert long["validation"][: len(short["validation"])] == short["validation"]


@pytest.mark.parametrize("count", [2, 3, 10, 100, 999])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_few_documents_give_both_splits(count, fraction):
    texts = [f"para {i}\n\n" * (1 + i % 7) for i in range(count)]
    found = split(texts, fraction)
    total, held = sum(map(len, texts)), sum(map(len, found["validation"]))
    assert 0 < held < total
    assert held + sum(map(len, found["train"])) == total
    assert held <= max(fraction * total * 1.5, 60)


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n", " "])
def test_a_book_is_cut_at_a_border(end):
    book = "".join(f"paragraph {i}{end}" for i in range(1000)).replace("\u2028", "")
    found = split([book], 0.05)
    (head,), (tail,) = found["train"], found["validation"]
    assert head + tail == book
    assert head.endswith(end)
    assert end == " " or tail.startswith("paragraph ")
    assert 0.04 < len(tail) / len(book) < 0.06


def test_text_without_any_border_is_cut_where_it_must():
    assert [len(t) for t in split(["x" * 1000], 0.1)["validation"]] == [100]
    with pytest.raises(UserError, match="--validation_fraction=0"):
        split(["x"], 0.1)
    assert split(["ab", "cd"], 0.4)["validation"] in (["b"], ["d"])
    assert split(["a", "b"], 0.0) == {"train": ["a", "b"], "validation": []}
