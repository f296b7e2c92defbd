"""Find and load a tokenizer: SentencePiece, tiktoken ranks, Hugging Face JSON, or bytes."""

import json
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.files import lfs_problem
from llamajax.tokenizers.sentencepiece_model import SentencePieceTokenizer
from llamajax.tokenizers.tiktoken_ranks import TiktokenTokenizer
from llamajax.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from llamajax.tokenizers.tokenizer_json import HuggingFaceTokenizer

MANIFEST = "manifest.json"
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.byte")


def load_tokenizer(path: str | Path, *, fingerprint: str | None = None) -> Tokenizer:
    """Load `byte`, a file of a known kind, or what a directory holds: a prepared data set, a model.

    fingerprint: what a checkpoint records of it; None: what a data set does, if it is in one.
    Raises UserError if it is none of these.
    """
    if str(path) == "byte":
        return ByteTokenizer()
    if str(path).startswith("train:"):
        raise UserError(f"{path}: only llamajax.prepare trains a tokenizer; name its output here")
    file = Path(path)
    if file.is_dir():
        file, recorded = _file_in(file)
        fingerprint = fingerprint or recorded
    if not file.is_file():
        raise UserError(
            f"tokenizer {path}: no such file; give a file, a directory or `byte`; a model of the"
            " Hugging Face hub is downloaded first"
        )
    if file.suffix == ".byte":
        return ByteTokenizer(file)
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    if problem := lfs_problem(first_line):
        raise UserError(f"{file}: {problem}")
    if file.suffix == ".json":
        found = HuggingFaceTokenizer(file)
        if fingerprint is not None:
            found.begin_as_recorded(fingerprint)
        return found
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", first_line):
        return TiktokenTokenizer(file)
    return SentencePieceTokenizer(file)


def find_tokenizer(directory: Path) -> Path | None:
    """Return the tokenizer's file in a directory, None if there is none."""
    return next((directory / name for name in _FILES if (directory / name).is_file()), None)


def _file_in(directory: Path) -> tuple[Path, str | None]:
    """Return the tokenizer's file in a directory, and the fingerprint that a manifest states."""
    manifest = directory / MANIFEST
    if manifest.is_file():
        try:
            stated = json.loads(manifest.read_text("utf-8"))["tokenizer"]
            return directory / stated["file"], stated.get("fingerprint")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}: damaged; run llamajax.prepare again") from error
    if file := find_tokenizer(directory):
        return file, None
    raise UserError(
        f"{directory}: no tokenizer.json, tokenizer.model or manifest.json in this directory"
    )
