"""Processes that tokenise documents.

They are started as `python -c ...` with a pipe, not by multiprocessing: its children import the
caller's main module again, which breaks a script without a `__main__` guard, and forking is unsafe
once threads run (grain's, jax's).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llamajax.corpus.holdout import Part
from llamajax.data.shards import token_dtype
from llamajax.errors import UserError
from llamajax.tokenizers.chat import encode_example
from llamajax.tokenizers.loading import Tokenizer, load_tokenizer
from llamajax.verbs import STOP_SIGNALS

_BATCH_CHARS = 500_000
_BATCH_PARTS = 2_000
_CHILD = (
    "import sys; sys.path[:] = {path!r}; "
    "from llamajax.corpus.encoders import serve; serve({tokenizer!r}, {template!r})"
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents of one split: BOS and EOS around each, in one array, and the length of each.

    `answer`, for examples only: whether a token carries loss. `text_bytes` are those of the texts,
    or of the answers.
    """

    split: str
    tokens: np.ndarray
    answer: np.ndarray | None
    lengths: list[int]
    text_bytes: int


def tokenize(parts: list[Part], tokenizer: Tokenizer, template: str) -> list[Tokens]:
    """The tokens of the parts, texts or examples, one result a split."""
    results = []
    for split in ("train", "validation"):
        pieces, answers, lengths, text_bytes = [], [], [], 0
        for part in parts:
            if part.split != split:
                continue
            if isinstance(part.document, str):
                ids = [*tokenizer.start_ids, *tokenizer.encode(part.document), tokenizer.eos_id]
                texts = [part.document]
            else:
                ids, answer = encode_example(tokenizer, template, part.document.messages)
                answers.append(np.array(answer, bool))
                texts = part.document.answers
            pieces.append(np.array(ids, token_dtype(tokenizer.vocab_size)))
            lengths.append(len(ids))
            text_bytes += sum(len(t.encode("utf-8", "replace")) for t in texts)
        if pieces:
            mask = np.concatenate(answers) if answers else None
            results.append(Tokens(split, np.concatenate(pieces), mask, lengths, text_bytes))
    return results


def tokenize_all(
    parts: Iterable[Part], *, tokenizer_path: str, template: str, num_workers: int
) -> Iterator[Tokens]:
    """The tokens of all parts in their order, whatever the number of workers.

    With one worker the work is done here. A worker that dies raises UserError.
    """
    if num_workers == 1:
        tokenizer = load_tokenizer(tokenizer_path)
        for batch in _batched(parts):
            yield from tokenize(batch, tokenizer, template)
        return
    with _Pool(tokenizer_path, template, num_workers) as pool:
        yield from pool.map(_batched(parts))


def _batched(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    chars = 0
    for part in parts:
        batch.append(part)
        chars += len(part.document)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PARTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Pool:
    """Child processes, each talked to by whichever thread took it from the idle ones."""

    def __init__(self, tokenizer_path: str, template: str, num_workers: int) -> None:
        code = _CHILD.format(path=sys.path, tokenizer=tokenizer_path, template=template)
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(num_workers)
        ]
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                # What it had not read yet is of no use any more.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def map(self, batches: Iterable[list[Part]]) -> Iterator[Tokens]:
        """Results in order, with a few batches a worker under way."""
        waiting: collections.deque[concurrent.futures.Future[list[Tokens]]] = collections.deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._ask, batch))
            if len(waiting) >= 3 * len(self._children):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _ask(self, batch: list[Part]) -> list[Tokens]:
        child = self._idle.get()
        try:
            pickle.dump(batch, child.stdin, pickle.HIGHEST_PROTOCOL)
            child.stdin.flush()
            result = pickle.load(child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = child.wait()
            raise UserError(
                f"a tokenizer process ended with code {code} (its message, if any, stands above;"
                " -9: out of memory); try fewer --workers"
            ) from error
        self._idle.put(child)
        return result


def serve(tokenizer_path: str, template: str) -> None:
    """A worker's life: batches from stdin, tokens to stdout, until stdin ends."""
    # Ctrl-C reaches the whole process group; the parent decides, and its pipe ends.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    tokenizer = load_tokenizer(tokenizer_path)
    while True:
        try:
            batch = pickle.load(source)
        except EOFError:
            return
        try:
            pickle.dump(tokenize(batch, tokenizer, template), sink, pickle.HIGHEST_PROTOCOL)
            sink.flush()
        except BrokenPipeError:
            return
