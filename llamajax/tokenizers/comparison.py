"""Whether two tokenizers are one, although their files may be of two formats."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.loading import Tokenizer, load_tokenizer

# Two tokenizers that agree on this read the same text into the same tokens.
_PROBE = (
    "The quick brown fox\n\njumps over 12,345.67 lazy dogs;  don't  \tstop! naïve Straße 東京 "
    "Привет def f(x):\n    return {'key': [x ** 2]}  # <s> </s> <|begin_of_text|> 😀\n"
)


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both read a text into the same ids, BOS and EOS included.

    By what they do and not by their files alone: Llama's tokenizer.model and the tokenizer.json
    beside it are the same tokenizer with two fingerprints.
    """
    return is_recorded(one, tokenizer_record(other))


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer, for a checkpoint to be compared with later ones."""
    ids = json.dumps([tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode(_PROBE)])
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "probe": hashlib.sha256(ids.encode()).hexdigest(),
        "tokens": {**tokenizer.control_ids, **tokenizer.added_ids},  # the probe holds none
    }


def is_recorded(tokenizer: Tokenizer, record: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer reads text into the same ids as the one of `record`."""
    ours, theirs = tokenizer_record(tokenizer), record.get("tokens", {})
    if any(theirs.get(name, i) != i for name, i in ours["tokens"].items()):
        return False
    return any(ours[key] == record[key] for key in ("fingerprint", "probe"))


def describe(record: Mapping[str, Any]) -> str:
    """Name a tokenizer in a message."""
    size, fingerprint = record["vocab_size"], record["fingerprint"][:12]
    return f"{record['kind']}, {size} tokens, fingerprint {fingerprint}"


def load_recorded(
    path: Path | None, record: Mapping[str, Any] | None, *, of: PurePath
) -> Tokenizer | None:
    """Load the tokenizer at `path`; UserError where `record`, of checkpoint `of`, names another."""
    tokenizer = None if path is None else load_tokenizer(path)
    if tokenizer is None or record is None or is_recorded(tokenizer, record):
        return tokenizer
    raise UserError(
        f"{path} is another tokenizer ({describe(tokenizer_record(tokenizer))}) than the one that "
        f"checkpoint {of} was trained with ({describe(record)}): its token ids mean other text; "
        "put that tokenizer back"
    )
