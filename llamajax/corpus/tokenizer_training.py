"""Train the tokenizer of `train:N` on the input: a SentencePiece BPE with byte fallback."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamajax.corpus.holdout import DocumentPart
from llamajax.corpus.instructions import Example
from llamajax.corpus.long_text import LongText
from llamajax.errors import UserError
from llamajax.tokenizers.tokenizer import well_formed

# Enough for a vocabulary of 128 k pieces. SentencePiece needs about 10 bytes of memory for each.
MAX_BYTES = 256 << 20
_MAX_LINE_BYTES = 1 << 20
_MIN_PIECES = 260  # control pieces and bytes; a few more make a tokenizer


def parse_train(tokenizer: str) -> int | None:
    """Return N of `train:N`, None for any other value. Raises UserError for N out of range."""
    if not tokenizer.startswith("train:"):
        return None
    number = tokenizer.removeprefix("train:")
    if not re.fullmatch(r"\d+", number) or not _MIN_PIECES <= int(number) <= 1 << 20:
        raise UserError(
            f"--tokenizer={tokenizer}: N, the number of pieces, is {_MIN_PIECES}..{1 << 20}"
        )
    return int(number)


def train_tokenizer(
    parts: Iterable[DocumentPart], *, num_pieces: int, share: float, output: Path
) -> None:
    """Train on the lines of the training parts and write the model: same text, same bytes.

    share: fraction of the documents to learn from, drawn by the hash of their number.
    No normalization, no dropped spaces, runs of spaces as pieces: decoding restores every text.
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
    """Explain SentencePiece's error in terms of the flag."""
    if at_most := re.search(r"value <= (\d+)", message):
        return f"so little text yields at most {at_most[1]} pieces; use train:{at_most[1]} or less"
    if at_least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"this text has so many different characters that N must exceed {at_least[1]};"
            " use a larger one"
        )
    if "sentences_.empty()" in message:
        return "no line of the training text to learn from; add text, or name a tokenizer"
    return f"SentencePiece refuses: {message}"


def _lines(parts: Iterable[DocumentPart], share: float) -> Iterator[str]:
    """Yield lines without their newline, so that no piece ever spans two lines."""
    left = 2 * MAX_BYTES
    for number, part in enumerate(p for p in parts if p.split == "train"):
        draw = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=4, key=b"train").digest()
        is_drawn = int.from_bytes(draw, "little") <= share * 2**32
        if not is_drawn and not isinstance(part.document, LongText):  # of which there are few
            continue
        rest = ""  # of a long text: the beginning of a line
        for text in _texts(part.document):
            left -= len(text)
            if left < 0:
                return
            # SentencePiece skips lines with U+2585, which marks borders in its trainer.
            *lines, rest = re.split("[\n\u2585]", rest + well_formed(text))
            if len(rest) > _MAX_LINE_BYTES or not isinstance(part.document, LongText):
                lines, rest = [*lines, rest], ""
            for line in lines:
                yield from _short(line)
        yield from _short(rest)


def _texts(document: str | LongText | Example) -> Iterable[str]:
    if isinstance(document, Example):
        return [message.content for message in document.messages]
    return document if isinstance(document, LongText) else [document]


def _short(line: str) -> Iterator[str]:
    """Cut a line into pieces that SentencePiece does not skip, at spaces if it has any."""
    size = _MAX_LINE_BYTES // 4  # characters of at most four bytes
    while len(line) > size and len(line.encode()) > _MAX_LINE_BYTES:
        cut = line.rfind(" ", 1, size)
        cut = size if cut < 0 else cut
        yield line[:cut]
        line = line[cut:]
    if line:
        yield line
