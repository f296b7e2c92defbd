"""From a request and a checkpoint to the rows that are scored; wrong input is refused here."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.input_files import format_of, read_text
from llamajax.data import Tokenizer, load_tokenizer
from llamajax.errors import UserError
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.scoring import Rows
from llamajax.evaluation.windows import WindowRows, non_overlapping, separate, sliding_window
from llamajax.formats.weights import Weights
from llamajax.tokenizers.loading import MANIFEST
from llamajax.tokenizers.tokenizer_identity import check_vocabulary, data_mismatch, load_recorded

# A longer context than this has to be asked for: Llama 3.1's 131,072 tokens would be a surprise.
_DEFAULT_MAX_SEQ_LEN = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Rows, and what the result says of them.

    shape: of the per-token losses, None: (1, all of them). num_bytes: of the whole text in UTF-8.
    """

    rows: Rows
    protocol: str
    seq_len: int
    stride: int | None = None
    num_bytes: int | None = None
    shape: tuple[int, int] | None = None


def open_source(request: EvaluateOptions, weights: Weights) -> Source:
    """The rows that the request names. Raises UserError."""
    opened = {"data": _prepared, "text": _text, "token_ids": _token_ids}
    return opened[request.source](request, weights)


def _prepared(request: EvaluateOptions, weights: Weights) -> Source:
    from llamajax.evaluation.packed import PackedRows  # grain takes two seconds to import

    path, split = Path(request.data), request.split or "validation"
    if not (path / MANIFEST).is_file():
        what = "holds no manifest.json" if path.is_dir() else "no such directory"
        raise UserError(
            f"--data={path}: {what}; name a directory that llamajax.prepare wrote (a file of text "
            "is read with --text)"
        )
    trained = _trained_on(weights)
    seq_len = _seq_len(request, weights, default=trained.get("seq_len"))
    rows = PackedRows(
        path,
        split=split,
        seq_len=seq_len,
        mask_documents=trained.get("mask_documents", True),
        vocab_size=weights.model.vocab_size,
    )
    if weights.tokenizer is not None:
        ours, theirs = load_tokenizer(path), _load(weights)
        if problem := data_mismatch(f"--data={path}", ours, theirs, weights.tokenizer):
            raise UserError(problem)
    return Source(rows=rows, protocol="packed", seq_len=seq_len, num_bytes=rows.text_bytes)


def _text(request: EvaluateOptions, weights: Weights) -> Source:
    path, protocol = Path(request.text), request.protocol or "non_overlapping"
    if format_of(path) in (".jsonl", ".parquet"):
        raise UserError(
            f"--text={path}: not plain text; prepare it with llamajax.prepare and name that "
            "directory with --data"
        )
    seq_len = _seq_len(request, weights, default=None)
    stride = _stride(request, seq_len) if protocol == "sliding_window" else None
    tokenizer, text = _tokenizer(weights), read_text(path)
    # Without a BOS token EOS precedes the first target, as in the harness.
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = np.array([first, *tokenizer.encode(text)], np.int32)
    if len(ids) < 2:
        raise UserError(f"--text={path}: is empty; there is nothing to predict")
    if stride is None:
        windows = non_overlapping(len(ids), seq_len)
    else:
        windows = sliding_window(len(ids), seq_len, stride)
    return Source(
        rows=WindowRows(ids, windows),
        protocol=protocol,
        seq_len=seq_len,
        stride=stride,
        num_bytes=len(text.encode()),
    )


def _token_ids(request: EvaluateOptions, weights: Weights) -> Source:
    name, model = f"--token_ids={request.token_ids}", weights.model
    array = _npy(Path(request.token_ids), name)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{name}: is {array.dtype} of shape {array.shape}; it must hold integers of shape (T,) "
            "or (B, T)"
        )
    ids = array if array.ndim == 2 else array[None]
    num_rows, length = ids.shape
    if num_rows < 1 or length < 2:
        raise UserError(
            f"{name}: has shape {array.shape}; a target needs a token before it: T >= 2"
        )
    if length > model.max_seq_len:
        raise UserError(
            f"{name}: rows of {length} tokens are longer than the model's context of "
            f"{model.max_seq_len}; cut them, or use --text, which reads in windows"
        )
    outside = np.argwhere((array < 0) | (array >= model.vocab_size))
    if len(outside):
        place = tuple(int(i) for i in outside[0])
        raise UserError(
            f"{name}: token id {array[place]} at {list(place)} is outside the model's vocabulary, "
            f"0..{model.vocab_size - 1} (the first of {len(outside)})"
        )
    rows = WindowRows(ids.astype(np.int32).reshape(-1), separate(num_rows, length))
    shape = (num_rows, length - 1)
    return Source(rows=rows, protocol="token_ids", seq_len=length, shape=shape)


def _npy(path: Path, name: str) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{name}: not a NumPy file of integers ({str(error)[:200]}); write it with numpy.save"
        ) from None


def _seq_len(request: EvaluateOptions, weights: Weights, *, default: int | None) -> int:
    longest = weights.model.max_seq_len
    seq_len = request.seq_len or default or min(longest, _DEFAULT_MAX_SEQ_LEN)
    if seq_len > longest:
        raise UserError(
            f"--seq_len={seq_len}: is longer than the model's context of {longest} tokens"
        )
    return seq_len


def _stride(request: EvaluateOptions, seq_len: int) -> int:
    stride = request.stride or max(1, seq_len // 2)
    if stride >= seq_len:
        raise UserError(
            f"--stride={stride}: must be below --seq_len={seq_len}, so that every token has one "
            "before it in its window; for windows that do not overlap use "
            "--protocol=non_overlapping"
        )
    return stride


def _trained_on(weights: Weights) -> dict[str, Any]:
    """The data section of the run that made a checkpoint of ours; empty where unknown."""
    if weights.checkpoint is None:
        return {}
    return (weights.checkpoint.meta.get("config") or {}).get("data") or {}


def _tokenizer(weights: Weights) -> Tokenizer:
    if weights.tokenizer is None:
        raise UserError(
            f"{weights.path} has no tokenizer, and --text needs one: put the tokenizer.json or "
            "tokenizer.model of the model there, or give --token_ids"
        )
    tokenizer = _load(weights)
    check_vocabulary(tokenizer, weights.model.vocab_size)
    return tokenizer


def _load(weights: Weights) -> Tokenizer:
    return load_recorded(weights.tokenizer, weights.tokenizer_record, of=weights.path)
