"""Compare tokenizers by what they do: two files of two formats can hold the same tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.loading import load_tokenizer
from llamajax.tokenizers.tokenizer import Tokenizer

# Two tokenizers that agree on this text are taken for the same.
_PROBE = (
    "The quick brown fox\n\njumps over 12,345.67 lazy dogs;  don't  \tstop! naïve Straße 東京 "
    "Привет def f(x):\n    return {'key': [x ** 2]}  # <s> </s> <|begin_of_text|> 😀\n"
)


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer, for a checkpoint to be compared with later ones."""
    first = next(iter(tokenizer.start_ids), None)
    ids = json.dumps([first, tokenizer.eos_id, tokenizer.encode(_PROBE)])
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "probe": hashlib.sha256(ids.encode()).hexdigest(),
        "tokens": {**tokenizer.control_ids, **tokenizer.added_ids},  # the probe holds none
    }


def matches_record(tokenizer: Tokenizer, record: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer encodes text into the same ids as the one of `record`."""
    ours, theirs = tokenizer_record(tokenizer), record.get("tokens", {})
    if any(theirs.get(name, i) != i for name, i in ours["tokens"].items()):
        return False
    return any(ours[key] == record[key] for key in ("fingerprint", "probe"))


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers encode text into the same ids, BOS and EOS included."""
    return matches_record(one, tokenizer_record(other))


def describe(record: Mapping[str, Any]) -> str:
    """Name a tokenizer in a message."""
    size, fingerprint = record["vocab_size"], record["fingerprint"][:12]
    return f"{record['kind']}, {size} tokens, fingerprint {fingerprint}"


def load_recorded(
    path: Path | None, record: Mapping[str, Any] | None, *, of: PurePath
) -> Tokenizer | None:
    """Load the tokenizer at `path`; UserError where `record`, of checkpoint `of`, names another."""
    if path is None:
        return None
    tokenizer = load_tokenizer(path, fingerprint=record and record["fingerprint"])
    if record is None or matches_record(tokenizer, record):
        return tokenizer
    raise UserError(
        f"{path} is another tokenizer ({describe(tokenizer_record(tokenizer))}) than the one that "
        f"checkpoint {of} was trained with ({describe(record)}): its token ids mean other text; "
        "put that tokenizer back"
    )


def data_mismatch(
    data: str, ours: Tokenizer, theirs: Tokenizer, weights_tokenizer: Path
) -> str | None:
    """Return what is wrong with data prepared with `ours` for weights trained with `theirs`.

    data: the flag or key with its value, as "--data=DIR". None where the two encode alike.
    """
    if same_tokens(ours, theirs):
        return None
    one, other = (
        f"{t.kind}, {t.vocab_size} tokens, {'BOS' if t.start_ids else 'no BOS'} before texts"
        for t in (ours, theirs)
    )
    fix = how_to_prepare(weights_tokenizer, tokenizer_record(theirs))
    return (
        f"{data} was prepared with another tokenizer ({one}) than the weights' own, "
        f"{weights_tokenizer} ({other}): {fix}"
    )


def how_to_prepare(path: Path, record: Mapping[str, Any]) -> str:
    """Return how text is prepared with the tokenizer of `record`, which is at `path`."""
    if not path.exists() or matches_record(load_tokenizer(path), record):
        return f"prepare the text again with --tokenizer={path}"
    return (
        "texts of that one begin with BOS, as in data of versions until 2026-11: prepare the text "
        "again with --tokenizer=DIR of that data, or of an export (python -m llamajax.convert)"
    )


def check_vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Raise UserError if a tokenizer has more tokens than the model (`vocab_size`)."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.file or tokenizer.kind} has {tokenizer.vocab_size:,} tokens "
            f"and the model's vocabulary only {vocab_size:,}: they do not belong together; put the "
            "model's own tokenizer there, or remove it if only token ids or weights are needed"
        )
