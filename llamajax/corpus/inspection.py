"""Describe a prepared directory: what is in it, and how its documents begin."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.data import shards
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer, load_tokenizer

_SHOWN_DOCUMENTS, _SHOWN_TOKENS = 3, 60


def summary(manifest: dict[str, Any]) -> list[str]:
    """Return lines about the tokenizer and each split."""
    tokenizer = manifest["tokenizer"]
    lines = [
        f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens,"
        f" fingerprint {tokenizer['fingerprint'][:12]}"
    ]
    for name, split in manifest["splits"].items():
        documents, text = f"{split['documents']:,} documents", "text"
        if learned := split.get("loss_tokens"):
            documents, text = f"{split['documents']:,} examples", "answers"
        lines.append(
            f"{name:<11} {documents}, {split['tokens']:,} tokens,"
            f" {split['text_bytes']:,} bytes of {text}, {len(split['shards'])} shards,"
            f" unigram entropy {split['unigram_entropy']:.3f} nats"
        )
        if learned:
            over = [f"{n:,} over {size}" for size, n in split["documents_over"].items() if n]
            lines.append(
                f"{'':<11} {learned:,} tokens ({learned / split['tokens']:.1%}) carry loss;"
                f" longest example {split['longest_document']:,} tokens"
                + (f" ({', '.join(over)}: cut at the sequence length)" if over else "")
            )
    if "unigram_loss" in manifest["splits"].get("validation", {}):
        loss = manifest["splits"]["validation"]["unigram_loss"]
        lines.append(
            f"baseline    {loss:.3f} nats per token: validation, by train's token frequencies"
        )
    left_out = manifest.get("left_out", {})
    if rows := left_out.get("rows"):
        lines.append(f"left out    {rows:,} bad row{'s' * (rows > 1)} of the input")
    if left_out.get("unsafe_cuts"):
        lines.append(f"cuts        {left_out['unsafe_cuts']:,} within texts change a token")
    return lines


def inspect_directory(directory: Path) -> str:
    """Return a description of a prepared directory. Raises UserError for anything else."""
    manifest = shards.read_manifest(directory)
    if lacking := [key for key in ("tokenizer", "input", "splits") if key not in manifest]:
        raise UserError(
            f"{directory}: its manifest lacks {', '.join(lacking)}: damaged or not written by "
            "llamajax.prepare"
        )
    tokenizer, source = load_tokenizer(directory), dict(manifest["input"])
    files = source.pop("files")
    more = f" and {len(files) - 10:,} more" if len(files) > 10 else ""
    lines = [
        f"directory   {directory}, format version {manifest['format_version']}",
        f"input       {len(files):,} files: {', '.join(files[:10])}{more}",
        f"            {', '.join(f'{name} {value!r}' for name, value in source.items())}",
        *summary(manifest),
        *(f"            - {problem}" for problem in manifest.get("left_out", {}).get("first", [])),
        f"ends        BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}; texts begin with "
        f"{tokenizer.start_ids or 'no token'}",
    ]
    for name, split in manifest["splits"].items():
        for shard in split["shards"]:
            lines.append(
                f"shard       {shard['file']}: {shard['tokens']:,} tokens, {shard['bytes']:,} bytes"
            )
        for number, start in enumerate(
            itertools.islice(_beginnings(directory, manifest, split), _SHOWN_DOCUMENTS), 1
        ):
            lines.append(f"{name:<11} document {number}: {_shown(tokenizer, start)}")
    return "\n".join(lines)


def _beginnings(
    directory: Path, manifest: dict[str, Any], split: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Yield the first tokens of each document, as far as they are in one block."""
    masked = bool(manifest.get("loss_mask"))
    dtype = np.dtype(manifest["token_dtype"])
    reader = shards.SplitReader(directory, split["shards"], dtype, masked=masked)
    for number in range(sum(shard["records"] for shard in split["shards"])):
        [block] = reader.blocks([number])
        # The last token is the first of the next block, and the last start may be its.
        starts = [int(start) for start in block.starts if start < manifest["block_tokens"]]
        for start, end in itertools.pairwise([*starts, len(block.tokens)]):
            yield block.tokens[start : min(end, start + _SHOWN_TOKENS)]


def _shown(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    text = tokenizer.decode(tokens.tolist())
    return f"{text!r}" + ("" if tokens[-1] == tokenizer.eos_id else " ...")
