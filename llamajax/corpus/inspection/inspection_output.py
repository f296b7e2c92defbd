"""What `prepare` prints of a prepared directory, and the page of its inspection."""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamajax.corpus.inspection.document_reader import MAX_DOCUMENT
from llamajax.monitoring.report.html_page import html_page
from llamajax.tokenizers import Tokenizer

# A split counts as unshuffled from here: correlation of neighbors, and in standard errors.
_ALIKE, _ALIKE_ERRORS = 0.02, 4


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
            lines.append(
                f"{'':<11} {learned:,} tokens ({learned / split['tokens']:.1%}) carry loss;"
                f" longest example {split['longest_document']:,} tokens"
            )
            if packing := split.get("packing"):  # none of an earlier version
                rows = (
                    f"{each['efficiency']:.1%} at {length}"
                    + f" ({each['cut_examples_share']:.1%} of the examples cut)"
                    * (each["cut_examples_share"] > 0)
                    for length, each in packing.items()
                )
                lines.append(f"{'':<11} tokens fill rows of whole examples by {', '.join(rows)}")
        lines += [f"{'':<11} {line}" for line in _counted(split, tokenizer["vocab_size"])]
    if "unigram_loss" in manifest["splits"].get("validation", {}):
        loss = manifest["splits"]["validation"]["unigram_loss"]
        lines.append(
            f"baseline    {loss:.3f} nats per token: validation, by train's token frequencies"
        )
    left_out = manifest.get("left_out", {})
    if rows := left_out.get("rows"):
        lines.append(f"left out    {rows:,} bad row{'s' * (rows > 1)} of the input")
        lines += [f"            - {n:,}: {why}" for why, n in left_out.get("reasons", {}).items()]
    if left_out.get("blank"):
        lines.append(f"blank       {left_out['blank']:,} texts of white space alone")
    if left_out.get("unsafe_cuts"):
        lines.append(f"cuts        {left_out['unsafe_cuts']:,} within texts change a token")
    return lines


def _counted(split: dict[str, Any], vocab_size: int) -> Iterator[str]:
    """Yield what `prepare` counted of a split; nothing of a directory of an earlier version."""
    if "copies" in split:
        used, text_tokens = split["used_tokens"], split.get("loss_tokens", split["tokens"])
        yield (
            f"{split['tokens'] / split['documents']:,.0f} tokens a document, "
            f"{split['text_bytes'] / max(1, text_tokens):.2f} bytes per token, {used:,} tokens of "
            f"the vocabulary occur ({used / vocab_size:.1%})"
        )
        about = "about " if split["copies_estimated"] else ""
        yield f"{about}{split['copies']:,} documents are exact copies of an earlier one"


def describe(directory: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines about the input, the splits, the tokenizer and the shards."""
    source = dict(manifest["input"])
    files, inputs = source.pop("files"), source.pop("inputs", [])
    more = f" and {len(files) - 10:,} more" if len(files) > 10 else ""
    yield f"directory   {directory}, format version {manifest['format_version']}"
    yield f"input       {len(files):,} files: {', '.join(files[:10])}{more}"
    for each in (*inputs, source):
        yield f"            {', '.join(f'{name} {value!r}' for name, value in each.items())}"
    yield from summary(manifest)
    yield (
        f"ends        BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}; texts begin with "
        f"{tokenizer.start_ids or 'no token'}"
    )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            size = f"{shard['tokens']:,} tokens, {shard['bytes']:,} bytes"
            yield f"shard       {shard['file']}: {size}"


def findings(found: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about each thing that harms a training or its evaluation."""
    in_train = _at_least(found["splits"]["train"])
    for name, split in found["splits"].items():
        exact = split["copies"]["exact"]
        read, copies, unlike = split["read_documents"], split["copies"], split["unlike"]
        order, samples = split["order"], split["packing"]
        about = "about " if copies["exact_estimated"] else ""
        counts = {
            f"only {split['read_share']:.1%} of the tokens were read: what is in the others is not "
            "seen; --max_tokens=none reads all": split["read_share"] < 1,
            f"of {split['truncated_documents']:,} documents the first {MAX_DOCUMENT:,} tokens were "
            "read": split["truncated_documents"],
            "exact copies were not counted: an earlier version prepared it": exact is None,
            f"{about}{exact or 0:,} of {split['documents']:,} documents are exact copies of an "
            "earlier one": exact,
            f"{_at_least(split)}{copies['near']:,} of {copies['compared']:,} different documents "
            "are nearly the same as an earlier one": copies["near"],
            f"{in_train}{copies.get('in_train', 0):,} of {read:,} documents are in train as "
            "well": copies.get("in_train"),
            f"{unlike['documents']:,} of {unlike['compared']:,} documents are unlike the rest in "
            "their tokens or bytes per token: another language, tables, code": unlike["documents"],
        }
        yield from (f"{name}: {sentence}" for sentence, count in counts.items() if count)
        neighbors = "efficiency" not in samples  # those of a row are from anywhere
        limit = max(_ALIKE, _ALIKE_ERRORS * order.get("standard_error", 0))
        if neighbors and order and order["correlation"] > limit:
            yield (
                f"{name}: not shuffled: the content of successive documents has a correlation of "
                f"{order['correlation']:.3f} (shuffled: 0 ± {order['standard_error']:.3f}). "
                "Training shuffles samples, not documents: one holds "
                f"{samples['documents_per_sample']:.1f} neighbors; shuffle the input"
            )
    for row in found["overlap"]:
        if left_out := row["rows_left_out"]:
            yield f"{row['text']}: {left_out:,} rows were not looked for in train, or only in part"
        if half := row["rows_half_found"]:
            rows = f"{half:,} of {row['rows']:,} rows of {row['text']}"
            yield f"train holds at least half of {in_train}{rows}"


def _at_least(split: dict[str, Any]) -> str:
    return "at least " if split["read_share"] < 1 else ""


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield title and rows, as text, of all that `inspect` found. Lists have a row of heads."""
    yield "findings", [[text] for text in findings(found)] or [["none"]]
    for name, part in found["splits"].items():
        facts = {key: value for key, value in part.items() if not isinstance(value, list)}
        yield name, [[_words(key), _shown(key, value)] for key, value in facts.items()]
        lists = {key: value for key, value in part.items() if isinstance(value, list)}
        yield from ((f"{name}: {_words(key)}", _rows(value)) for key, value in lists.items())
    share = found["splits"]["train"]["read_share"]
    train = "train" if share == 1 else f"{share:.1%} of train"
    yield f"overlap with {train}", _rows(found["overlap"])
    yield f"rows that overlap with {train}", _rows(found["overlapping_rows"])
    yield "left out", _rows(found["left_out"])


def _rows(items: list[dict[str, Any]]) -> list[list[str]]:
    """Return the names of the items' keys, then their values; nothing without items."""
    heads = [[_words(key) for key in item] for item in items[:1]]
    return heads + [[_shown(key, value) for key, value in item.items()] for item in items]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(key: str, value: Any) -> str:
    """Return a value on one line: shares in percent, numbers with commas."""
    if isinstance(value, dict):
        return ", ".join(f"{_words(k)} {_shown(k, v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.1%}" if key.endswith("share") else f"{value:,.3f}"
    return f"{value:,}" if type(value) is int else " ".join(str(value).split())


def text_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the tables as text; those without rows are left out."""
    for title, rows in tables(found):
        if rows:
            yield f"\n{title}"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            yield f"  {line.rstrip()}"


def to_html(found: dict[str, Any]) -> str:
    """Return the tables as a page that needs nothing else."""
    body = [f"<h1>{html.escape(found['directory'])}</h1>"]
    for title, rows in tables(found):
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        table = "".join(f"<tr>{line}</tr>\n" for line in lines)
        body.append(
            f'<section class="card"><h2>{html.escape(title)}</h2><div class="scroll wrap">'
            f"<table>{table}</table></div></section>"
        )
    return html_page(found["directory"], "\n".join(body))
