"""Tokenize documents, in this process or in worker processes.

Not `concurrent.futures.ProcessPoolExecutor`: spawn and forkserver import the caller's main module
again, which breaks a script without a `__main__` guard; fork is unsafe once threads run (grain's,
jax's); and its workers outlive a parent that was killed. Here a worker is `python -c`, and ends
with its pipe.
"""

import collections
import contextlib
import dataclasses
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from llamajax.corpus.documents import LeftOut
from llamajax.corpus.holdout import SPLITS, DocumentPart
from llamajax.corpus.instructions import Example
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.data.shards import token_dtype
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer, load_tokenizer
from llamajax.tokenizers.chat import encode_example
from llamajax.verbs import STOP_SIGNALS

# Long texts are cut into pieces that several workers can encode.
_PIECE_CHARS = 400_000
# A longer stretch without a safe cut is cut anyway: memory grows with it, by about 400 bytes a
# character (Llama 3's tokenizer.json on Chinese).
_MAX_PIECE_CHARS = 1 << 19
_BATCH_CHARS = 500_000
_BATCH_PARTS = 2_000
_BATCHES_PER_WORKER = 3  # being tokenized, or waiting for their turn: bounds the memory
_WORKER = (
    "import sys; sys.path[:] = {path!r}; "
    "from llamajax.corpus.tokenizing import serve; serve({tokenizer!r}, {template!r})"
)


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Tokenized documents of one split: BOS and EOS around each, all in one array.

    answer: of examples, whether each token carries loss. lengths, text_bytes: tokens and bytes of
    each document (of an example's answers). continues: the first goes on with the document before.
    """

    split: str
    tokens: np.ndarray
    answer: np.ndarray | None
    lengths: list[int]
    text_bytes: list[int]
    continues: bool = False


def by_split(
    held: np.ndarray,
    tokens: np.ndarray,
    answer: np.ndarray | None,
    lengths: np.ndarray,
    text_bytes: np.ndarray,
    *,
    continues: bool = False,
) -> Iterator[TokenizedDocuments]:
    """Divide documents into splits; `held` says of each whether it is held out."""
    for split, flags in (("train", ~held), ("validation", held)):
        if flags.any():
            each = np.repeat(flags, lengths)
            yield TokenizedDocuments(
                split,
                tokens[each],
                None if answer is None else answer[each],
                lengths[flags].tolist(),
                text_bytes[flags].tolist(),
                continues=continues and bool(flags[0]),
            )


def in_pieces(
    parts: Iterable[DocumentPart], tokenizer: Tokenizer, left_out: LeftOut
) -> Iterator[DocumentPart]:
    """Cut long texts where that changes no token.

    A stretch without such a place is cut anyway, and counted in `left_out`.
    """
    for part in parts:
        document = part.document
        if isinstance(document, str) and len(document) > _PIECE_CHARS:
            document = [document]
        if isinstance(document, str | Example):
            yield part
            continue
        piece = None
        for text, cut_is_safe in _pieces(document, tokenizer):
            if piece is not None:
                yield dataclasses.replace(piece, ends=False)
            piece = DocumentPart(part.split, text, begins=piece is None)
            left_out.unsafe_cuts += not cut_is_safe
        yield piece


def _pieces(chunks: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text, each with whether the cut after it is safe."""
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > _PIECE_CHARS:
            # No further than this, so that pieces do not depend on the size of the chunks.
            window = rest[start : start + _MAX_PIECE_CHARS + 1]
            end = tokenizer.safe_cut(window, _PIECE_CHARS)
            if end is None and len(window) <= _MAX_PIECE_CHARS:
                break
            yield window[: end or _MAX_PIECE_CHARS], end is not None
            start += end or _MAX_PIECE_CHARS
        rest = rest[start:]
    yield rest, True


def tokenize(
    parts: list[DocumentPart], tokenizer: Tokenizer, template: str
) -> list[TokenizedDocuments]:
    """Tokenize texts or examples; one result for each split."""
    results = []
    for split in SPLITS:
        own = [part for part in parts if part.split == split]
        arrays, answers = [], []
        for part in own:
            if isinstance(part.document, str):
                ids = tokenizer.encode_array(part.document, continues=not part.begins)
                start = tokenizer.start_ids if part.begins else []
                ids = np.concatenate([start, ids, [tokenizer.eos_id] * part.ends])
            else:
                ids, answer = encode_example(tokenizer, template, part.document.messages)
                answers.append(np.array(answer, bool))
            arrays.append(np.asarray(ids).astype(token_dtype(tokenizer.vocab_size)))
        if own:
            results.append(
                TokenizedDocuments(
                    split,
                    np.concatenate(arrays),
                    np.concatenate(answers) if answers else None,
                    [len(ids) for ids in arrays],
                    [part.text_bytes for part in own],
                    continues=not own[0].begins,
                )
            )
    return results


def tokenize_all(
    parts: Iterable[DocumentPart], tokenizer: Tokenizer, options: PrepareOptions, left_out: LeftOut
) -> Iterator[TokenizedDocuments]:
    """Yield the tokens of all parts in their order, whatever the number of workers.

    One worker: the work is done in this process. Several load the tokenizer from its file. Cuts
    that change tokens are counted in `left_out`. Raises UserError if a worker dies.
    """
    parts = in_pieces(parts, tokenizer, left_out)
    template, num_workers = options.chat_template, options.num_workers
    if num_workers == 1:
        for batch in _batched(parts):
            yield from tokenize(batch, tokenizer, template)
        return
    name = str(tokenizer.file or tokenizer.kind)
    code = _WORKER.format(path=sys.path, tokenizer=name, template=template)
    command = [sys.executable, "-c", code]
    workers: list[subprocess.Popen] = []
    own = threading.local()

    def ask(batch: list[DocumentPart]) -> list[TokenizedDocuments]:
        """Have the worker of this thread tokenize a batch."""
        if not hasattr(own, "worker"):
            own.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            workers.append(own.worker)
        return _ask(own.worker, batch)

    threads = ThreadPoolExecutor(num_workers)
    results: collections.deque[Future[list[TokenizedDocuments]]] = collections.deque()
    try:
        for batch in _batched(parts):
            results.append(threads.submit(ask, batch))
            if len(results) == _BATCHES_PER_WORKER * num_workers:
                yield from results.popleft().result()
        while results:
            yield from results.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            with contextlib.suppress(BrokenPipeError), worker:  # closes its pipes and waits for it
                pass


def _batched(parts: Iterable[DocumentPart]) -> Iterator[list[DocumentPart]]:
    """Yield lists of parts; one that goes on with a document is the first of its list."""
    batch: list[DocumentPart] = []
    chars = 0
    for part in parts:
        if batch and not part.begins:
            yield batch
            batch, chars = [], 0
        batch.append(part)
        chars += len(part.document)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PARTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _ask(worker: subprocess.Popen, batch: list[DocumentPart]) -> list[TokenizedDocuments]:
    """Send a worker a batch and return its tokens."""
    try:
        pickle.dump(batch, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        return pickle.load(worker.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"a tokenizer process ended with code {worker.wait()} (its message, if any, stands "
            "above; -9: out of memory); try fewer --workers"
        ) from error


def serve(tokenizer_path: str, template: str) -> None:
    """Run a worker: read batches from stdin and write tokens to stdout, until stdin ends."""
    # Ctrl-C reaches the whole process group; the parent decides, and its pipe ends.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    tokenizer = load_tokenizer(tokenizer_path)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(tokenize(pickle.load(source), tokenizer, template), sink, -1)
            sink.flush()
