"""Prints how fast prepared data is read, or (`--tokenizers`) how fast text is tokenized.

    python benchmarks/data_path.py [--path=PREPARED] [--seq_len=4096] [--batch_size=8]
    taskset -c 0 python benchmarks/data_path.py        (one core, as a table of its own)
    python benchmarks/data_path.py --tokenizers [--text=FILE.txt] [--tokenizer=FILE ...]

The rows of a table alternate within each round, so that a busy machine slows all of them; figures
are medians over the rounds, with the lowest and the highest. `CPU` counts the tokens per second of
processor time, all threads together (grain's reader uses several).
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from llamajax import data, prepare
from llamajax.config.schema import DataConfig
from llamajax.data.shards import BLOCK_TOKENS, unpack_block

ROUNDS = 5


def synthetic(directory: Path, num_tokens: int) -> Path:
    """A prepared directory of random words, documents of 100 to 10,000 bytes, as large as asked."""
    rng = np.random.default_rng(0)
    source = directory / "text.jsonl"
    words = np.array(["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 9, 999)])
    written = 0
    with source.open("w") as file:
        while written < num_tokens:
            text = " ".join(rng.choice(words, int(10 ** rng.uniform(1.3, 3.3))))
            file.write(f'{{"text": "{text}"}}\n')
            written += len(text) + 2
    output = directory / "prepared"
    prepare.main([f"--input={source}", f"--output={output}", "--tokenizer=byte"])
    source.unlink()
    return output


def ours(mixture: data.Mixture, args: argparse.Namespace, threads: int) -> Iterator[object]:
    """Batches as the training loop reads them."""
    position = data.Position.start(
        batch_size=args.batch_size, seq_len=args.seq_len, mixture_hash=mixture.hash
    )
    return data.train_batches(
        {mixture.hash: mixture},
        position,
        first_step=0,
        rows=range,
        num_threads=threads,
        prefetch=4 if threads else 0,
    )


def plain_grain(mixture: data.Mixture, args: argparse.Namespace, threads: int) -> Iterator[object]:
    """What a user of grain alone would write: whole records, shuffled, as int32, in batches.

    Without positions, segments or a loss mask, and with the length fixed at preparation.
    """
    source = mixture.sources[0]
    paths = [str(source.path / s["file"]) for s in source.stats["shards"]]
    dtype = np.dtype(source.manifest["token_dtype"])

    def tokens(record: bytes) -> np.ndarray:
        block = unpack_block(record, dtype, masked=False).tokens
        whole = np.zeros(BLOCK_TOKENS + 1, np.int32)
        whole[: len(block)] = block
        return whole

    records = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths))
    batches = records.shuffle(seed=1).map(tokens).repeat().batch(args.batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 if threads else 0)
    return iter(batches.to_iter_dataset(options))


def reading(args: argparse.Namespace) -> None:
    """Print the table of the data path."""
    with tempfile.TemporaryDirectory() as scratch:
        path = args.path or synthetic(Path(scratch), args.tokens)
        config = DataConfig(
            path=str(path), seq_len=args.seq_len, global_batch_size=args.batch_size, seed=1
        )
        mixture = data.open_mixture(config, split="train", vocab_size=1 << 31)
        print(
            f"{mixture.num_tokens:,} tokens, T = {args.seq_len}, batch {args.batch_size}, shuffled"
        )
        rows: list[tuple[str, Iterator[object], int]] = []
        for threads in (0, 1, 2):
            name = f"{threads} threads" if threads else "in the caller's thread"
            rows.append((f"llamajax, {name}", ours(mixture, args, threads), args.seq_len))
            rows.append((f"plain grain, {name}", plain_grain(mixture, args, threads), BLOCK_TOKENS))
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in rows}
        for _ in range(ROUNDS + 1):
            for name, batches, length in rows:
                for _ in range(8):  # what lies ready from the last round
                    next(batches)
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(args.steps):
                    next(batches)
                count = args.steps * args.batch_size * length / 1e6
                seconds = time.perf_counter() - wall, time.process_time() - cpu
                measured[name].append((count / seconds[0], count / seconds[1]))
        for _, batches, _ in rows:
            batches.close()
        table("M tokens/s", "wall", "CPU", {n: v[1:] for n, v in measured.items()})


def tokenizing(args: argparse.Namespace) -> None:
    """Print the table of the tokenizers."""
    text = Path(args.text).read_text("utf-8")[: args.chars]
    size = len(text.encode()) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers = {"byte": data.load_tokenizer("byte")}
        source, output = Path(scratch) / "text.txt", Path(scratch) / "out"
        source.write_text(text, "utf-8")
        prepare.main([f"--input={source}", f"--output={output}", "--tokenizer=train:8192"])
        tokenizers["train:8192"] = data.load_tokenizer(output)
        for name in args.tokenizer:
            tokenizers[Path(name).name] = data.load_tokenizer(name)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in tokenizers}
        for _ in range(ROUNDS):
            for name, tokenizer in tokenizers.items():
                start = time.perf_counter()
                count = len(tokenizer.encode(text))
                seconds = time.perf_counter() - start
                measured[name].append((size / seconds, count / seconds / 1e6))
    print(f"{args.text}: {size:.1f} MB as one document, one process")
    table("", "MB/s", "M tokens/s", measured)


def table(title: str, first: str, second: str, rows: dict[str, list[tuple[float, float]]]) -> None:
    """Medians and ranges, a row a name."""
    width = max(map(len, rows))
    print(f"{title:<{width}} {first:>8} {'range':>15} {second:>11} {'range':>15}")
    for name, values in rows.items():
        cells = []
        for column, size in zip(zip(*values, strict=True), (8, 11), strict=True):
            spread = f"{min(column):.1f}-{max(column):.1f}"
            cells.append(f"{statistics.median(column):>{size}.1f} {spread:>15}")
        print(f"{name:<{width}} {' '.join(cells)}")


def main(argv: list[str]) -> None:
    """Read the flags, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", help="a prepared directory; none: random words")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of the random words")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="batches a round and row")
    parser.add_argument("--tokenizers", action="store_true", help="measure tokenization instead")
    parser.add_argument("--text", default="launch/text/moby_dick.txt")
    parser.add_argument("--chars", type=int, default=5_000_000, help="of the text")
    parser.add_argument("--tokenizer", action="append", default=[], help="a file; may be repeated")
    args = parser.parse_args(argv)
    tokenizing(args) if args.tokenizers else reading(args)


if __name__ == "__main__":
    main(sys.argv[1:])
