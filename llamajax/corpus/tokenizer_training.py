"""`train:N`: a SentencePiece BPE tokenizer, with byte fallback, learned from the input itself."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamajax.corpus.holdout import Part
from llamajax.errors import UserError
from llamajax.tokenizers.tokenizer import well_formed

# Enough for a vocabulary of 128 k pieces; SentencePiece holds about 10 bytes of memory a byte.
MAX_BYTES = 256 << 20
_MAX_LINE_BYTES = 1 << 20
# Control pieces and bytes come first, and a vocabulary of single characters is no tokenizer.
MIN_PIECES = 260


def parse_train(tokenizer: str) -> int | None:
    """N of `train:N`; None if it is no such value. UserError for an N that makes no sense."""
    if not tokenizer.startswith("train:"):
        return None
    number = tokenizer.removeprefix("train:")
    if not re.fullmatch(r"\d+", number) or not MIN_PIECES <= int(number) <= 1 << 20:
        raise UserError(
            f"--tokenizer={tokenizer}: N, the number of pieces, is {MIN_PIECES}..{1 << 20}"
        )
    return int(number)


def train_tokenizer(parts: Iterable[Part], *, num_pieces: int, share: float, output: Path) -> None:
    """Train on the lines of the training parts and write the model; the same text gives the same
    bytes. `share` is the fraction of the documents to learn from, drawn by their number's hash.

    No normalisation, no dropped spaces, runs of spaces as pieces: every text survives a round trip.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(parts, share),
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--tokenizer=train:{num_pieces}: {_refusal(str(error))}") from error
    output.write_bytes(model.getvalue())


def _refusal(message: str) -> str:
    """What SentencePiece says, in terms of the flag."""
    if at_most := re.search(r"value <= (\d+)", message):
        return f"so little text yields at most {at_most[1]} pieces; use train:{at_most[1]} or less"
    if at_least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"this text has so many different characters that N must exceed {at_least[1]};"
            " use a larger one"
        )
    return f"SentencePiece refuses: {message}"


def _lines(parts: Iterable[Part], share: float) -> Iterator[str]:
    """Lines without their newline: so no piece ever spans two lines."""
    left = 2 * MAX_BYTES
    for number, part in enumerate(p for p in parts if p.split == "train"):
        draw = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=4, key=b"train").digest()
        if int.from_bytes(draw, "little") > share * 2**32:
            continue
        left -= len(part.document)
        if left < 0:
            return
        texts = [part.document] if isinstance(part.document, str) else part.document.texts
        for text in texts:
            # SentencePiece passes over a line with U+2585, which marks borders in its trainer.
            for line in re.split("[\n\u2585]", well_formed(text)):
                yield from _short(line)


def _short(line: str) -> Iterator[str]:
    """A line in pieces that SentencePiece does not pass over, cut at spaces if it has any."""
    size = _MAX_LINE_BYTES // 4  # characters of at most four bytes
    while len(line) > size and len(line.encode()) > _MAX_LINE_BYTES:
        cut = line.rfind(" ", 1, size)
        cut = size if cut < 0 else cut
        yield line[:cut]
        line = line[cut:]
    if line:
        yield line
