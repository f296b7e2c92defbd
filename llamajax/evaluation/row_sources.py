"""The rows that `evaluate` scores, opened and checked: prepared data, a text, or token ids."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.config.saved_config import record_of_step
from llamajax.corpus.input_files import format_of, read_text
from llamajax.data import Tokenizer, load_tokenizer
from llamajax.errors import UserError, say
from llamajax.evaluation.continuations import ContinuationRows, packed_length
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.task_files import Tasks, open_tasks
from llamajax.evaluation.windows import (
    non_overlapping,
    separate,
    sliding_window,
    window_rows,
)
from llamajax.formats.weights import Weights
from llamajax.tokenizers.loading import MANIFEST
from llamajax.tokenizers.tokenizer_identity import check_vocabulary, data_mismatch

# A longer context than this has to be asked for: Llama 3.1's 131,072 tokens would be a surprise.
_DEFAULT_MAX_SEQ_LEN = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows to score (`PackedRows` or `ContinuationRows`), and what the result says of them.

    shape: of the per-token losses, None: (1, all of them). num_bytes: of the whole text in UTF-8.
    facts: further fields of the result.
    """

    rows: Any
    protocol: str
    seq_len: int
    stride: int | None = None
    num_bytes: int | None = None
    shape: tuple[int, int] | None = None
    tasks: Tasks | None = None
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


def open_rows(options: EvaluateOptions, weights: Weights) -> RowSource:
    """Open the rows that the flags name. Raises UserError."""
    sources = {"data": _prepared, "text": _text, "token_ids": _token_ids, "tasks": _tasks}
    return sources[options.source](options, weights)


def _prepared(options: EvaluateOptions, weights: Weights) -> RowSource:
    from llamajax.evaluation.packed import PackedRows  # grain takes two seconds to import

    path = Path(options.data)
    if not (path / MANIFEST).is_file():
        what = "holds no manifest.json" if path.is_dir() else "no such directory"
        raise UserError(
            f"--data={path}: {what}; name a directory that llamajax.prepare wrote (a file of text "
            "is read with --text)"
        )
    run_config = {} if weights.checkpoint is None else weights.checkpoint.meta.get("config") or {}
    run_config = record_of_step(run_config, weights.step or 0)
    trained = run_config.get("data") or {}  # empty where the run's data is unknown
    rows = PackedRows(
        path,
        split=options.split or "validation",
        seq_len=_seq_len(options, weights, default=trained.get("seq_len")),
        mask_documents=trained.get("mask_documents", True),
        vocab_size=weights.model.vocab_size,
    )
    if weights.tokenizer is not None:
        theirs = weights.load_tokenizer()
        ours = load_tokenizer(path)
        if problem := data_mismatch(f"--data={path}", ours, theirs, weights.tokenizer):
            raise UserError(problem)
    if share := rows.facts.get("cut_examples_share"):
        say(
            f"warning: {share:.1%} of the examples, with {rows.facts['cut_loss_share']:.1%} of the "
            f"tokens that are scored, are longer than {rows.seq_len} tokens and cut: a part does "
            "not see those before it. --seq_len chooses another length"
        )
    facts = {"protocol": rows.protocol, "num_bytes": rows.text_bytes, "facts": rows.facts}
    return RowSource(rows=rows, seq_len=rows.seq_len, **facts)


def _text(options: EvaluateOptions, weights: Weights) -> RowSource:
    path, protocol = Path(options.text), options.protocol or "non_overlapping"
    if format_of(path) in (".jsonl", ".parquet"):
        raise UserError(
            f"--text={path}: not plain text; prepare it with llamajax.prepare and name that "
            "directory with --data"
        )
    seq_len = _seq_len(options, weights, default=None)
    stride = None
    if protocol == "sliding_window":
        stride = options.stride or max(1, seq_len // 2)
        if stride >= seq_len:
            raise UserError(
                f"--stride={stride}: must be below --seq_len={seq_len}, so that every token has "
                "one before it in its window; for windows that do not overlap use "
                "--protocol=non_overlapping"
            )
    tokenizer, text = needed_tokenizer(options, weights), read_text(path)
    # Without a BOS token EOS precedes the first target, as in lm-evaluation-harness.
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = np.array([first, *tokenizer.encode(text)], np.int32)
    if len(ids) < 2:
        raise UserError(f"--text={path}: is empty; there is nothing to predict")
    if stride is None:
        windows = non_overlapping(len(ids), seq_len)
    else:
        windows = sliding_window(len(ids), seq_len, stride)
    return RowSource(
        rows=window_rows(ids, windows),
        protocol=protocol,
        seq_len=seq_len,
        stride=stride,
        num_bytes=len(text.encode()),
    )


def _tasks(options: EvaluateOptions, weights: Weights) -> RowSource:
    tokenizer = needed_tokenizer(options, weights)
    seq_len = context_length(options, weights)
    tasks = open_tasks(options.tasks, tokenizer, seq_len=seq_len, label="--tasks")
    for line in tasks.warnings():
        say(f"warning: {line}")
    rows = ContinuationRows(tasks.encoded, packed_length(tasks.encoded, at_most=seq_len))
    return RowSource(rows=rows, protocol="tasks", seq_len=seq_len, tasks=tasks)


def context_length(options: EvaluateOptions, weights: Weights) -> int:
    """Return the most tokens that are read at a time: the model's context, or fewer if asked."""
    return _seq_len(options, weights, default=weights.model.max_seq_len)


def needed_tokenizer(options: EvaluateOptions, weights: Weights) -> Tokenizer:
    """Load the model's tokenizer. UserError where there is none, or one that does not fit."""
    if weights.tokenizer is None:
        raise UserError(
            f"{weights.path} has no tokenizer, and --{options.source} needs one: put the "
            "tokenizer.json or tokenizer.model of the model there, or give --token_ids"
        )
    tokenizer = weights.load_tokenizer()
    check_vocabulary(tokenizer, weights.model.vocab_size)
    return tokenizer


def _token_ids(options: EvaluateOptions, weights: Weights) -> RowSource:
    name, model = f"--token_ids={options.token_ids}", weights.model
    try:
        with Path(options.token_ids).open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{name}: not a NumPy file of integers ({str(error)[:200]}); write it with numpy.save"
        ) from None
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{name}: is {array.dtype} of shape {array.shape}; it must hold integers of shape (T,) "
            "or (B, T)"
        )
    num_rows, length = (array if array.ndim == 2 else array[None]).shape
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
        where = tuple(int(i) for i in outside[0])
        raise UserError(
            f"{name}: token id {array[where]} at {list(where)} is outside the model's vocabulary, "
            f"0..{model.vocab_size - 1} (the first of {len(outside)})"
        )
    rows = window_rows(array.astype(np.int32).reshape(-1), separate(num_rows, length))
    shape = (num_rows, length - 1)
    return RowSource(rows=rows, protocol="token_ids", seq_len=length, shape=shape)


def _seq_len(options: EvaluateOptions, weights: Weights, *, default: int | None) -> int:
    longest = weights.model.max_seq_len
    seq_len = options.seq_len or default or min(longest, _DEFAULT_MAX_SEQ_LEN)
    if seq_len > longest:
        raise UserError(
            f"--seq_len={seq_len}: is longer than the model's context of {longest} tokens"
        )
    return seq_len
