"""What a run says of its data before it starts."""

import re
from types import SimpleNamespace

import pytest

from llamajax.training.messages import data_warnings


def session(*, steps: int = 10, vocab_size: int = 300, held_out: tuple[str, ...] = ("a", "b")):
    """A run of 1,000 tokens a step over 10,000 tokens in `a` and `b`."""
    sources = {path: SimpleNamespace(path=path) for path in ("a", "b")}
    manifests = ({"tokenizer": {"vocab_size": 258}},)
    return SimpleNamespace(
        config=SimpleNamespace(
            train=SimpleNamespace(steps=steps),
            data=SimpleNamespace(global_batch_size=10, seq_len=100),
            model=SimpleNamespace(vocab_size=vocab_size),
        ),
        mixture=SimpleNamespace(
            sources=tuple(sources.values()), num_tokens=10_000, manifests=manifests
        ),
        held_out=SimpleNamespace(sources=tuple(sources[p] for p in held_out)),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2000}, "reads the 10.0k tokens of data.path 200 times"),
        ({"vocab_size": 128_256}, "model.vocab_size = 128,256, but the tokenizer .* only 258"),
        ({"held_out": ("b",)}, "evaluation leaves out a: prepared without a validation split"),
    ],
)
def test_odd_data_is_a_warning(changes, message):
    (line,) = data_warnings(session(**changes))
    assert re.search(message, line)


def test_usual_data_is_none():
    assert data_warnings(session()) == []
