"""Find and load a tokenizer: SentencePiece, tiktoken ranks, Hugging Face JSON, or bytes."""

import contextlib
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

    fingerprint: what a checkpoint records of it; None: what a data set does, if its file is in one,
    however it is named here. Raises UserError if it is none of these.
    """
    if str(path) == "byte":
        return ByteTokenizer()
    if str(path).startswith("train:"):
        raise UserError(f"{path}: only llamajax.prepare trains a tokenizer; name its output here")
    file = Path(path)
    if file.is_dir():
        file = _file_in(file)
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
        if recorded := fingerprint or _fingerprint_beside(file):
            found.begin_as_recorded(recorded)
        return found
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", first_line):
        return TiktokenTokenizer(file)
    return SentencePieceTokenizer(file)


def find_tokenizer(directory: Path) -> Path | None:
    """Return the tokenizer's file in a directory, None if there is none."""
    return next((directory / name for name in _FILES if (directory / name).is_file()), None)


def _fingerprint_beside(file: Path) -> str | None:
    """Return the fingerprint that the manifest of a data set states of the tokenizer in it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of something else
        stated = json.loads(file.with_name(MANIFEST).read_text("utf-8"))["tokenizer"]
        return stated["fingerprint"] if stated["file"] == file.name else None
    return None


def _file_in(directory: Path) -> Path:
    """Return the tokenizer's file in a directory."""
    manifest = directory / MANIFEST
    if manifest.is_file():
        try:
            return directory / json.loads(manifest.read_text("utf-8"))["tokenizer"]["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}: damaged; run llamajax.prepare again") from error
    if file := find_tokenizer(directory):
        return file
    raise UserError(
        f"{directory}: no tokenizer.json, tokenizer.model or manifest.json in this directory"
    )
