"""The writer and the reader of blocks, beneath `prepare` and the batches."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llamajax.data.prepared_split import PreparedSplit
from llamajax.data.shards import BLOCK_TOKENS, SplitWriter


def written(writer: SplitWriter, directory: Path, *, masked: bool) -> PreparedSplit:
    manifest = {"tokenizer": {"vocab_size": 258}, "loss_mask": masked}
    return PreparedSplit(directory, manifest | {"splits": {"train": writer.close()}}, "train")


def test_the_blocks_do_not_depend_on_the_calls_of_the_writer(tmp_path):
    rng = np.random.default_rng(2)
    tokens, answer = rng.integers(0, 258, 600_000), rng.random(600_000) < 0.5
    read = []
    for size in (150_000, 600_000):
        directory = tmp_path / str(size)
        directory.mkdir()
        writer = SplitWriter(directory, "train", 258, masked=True)
        for begin in range(0, len(tokens), size):
            part = slice(begin, begin + size)
            writer.add(tokens[part], [50_000] * (size // 50_000), text_bytes=0, answer=answer[part])
        source = written(writer, directory, masked=True)
        read.append(source.blocks(range(source.num_blocks)))
    for (tokens_a, starts_a, answer_a), (tokens_b, starts_b, answer_b) in zip(*read, strict=True):
        np.testing.assert_array_equal(tokens_a, tokens_b)
        np.testing.assert_array_equal(starts_a, starts_b)
        np.testing.assert_array_equal(answer_a, answer_b)
    stored = np.concatenate([block[2][:BLOCK_TOKENS] for block in read[0]])
    np.testing.assert_array_equal(stored, answer)


@pytest.fixture
def fast_switching():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switching")
def test_many_threads_read_the_blocks_they_ask_for(tmp_path: Path):
    tokens = np.repeat(np.arange(200), BLOCK_TOKENS)  # block n holds n
    writer = SplitWriter(tmp_path, "train", 258, masked=False)
    writer.add(tokens, [len(tokens)], text_bytes=0)
    source = written(writer, tmp_path, masked=False)
    begin, wrong = threading.Barrier(6), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        begin.wait()
        for _ in range(400):
            numbers = rng.integers(0, 200, 8).tolist()
            found = [int(tokens[0]) for tokens, _, _ in source.blocks(numbers)]
            if found != numbers:
                wrong.append((numbers, found))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
