"""What `prepare` prints of a prepared directory, and the page of its inspection."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.corpus.inspection.document_reader import MAX_DOCUMENT
from llamajax.monitoring.report.static_page import static_page
from llamajax.tokenizers import Tokenizer

# A split counts as unshuffled from here: correlation of neighbors, and in standard errors.
_ALIKE, _ALIKE_ERRORS = 0.02, 4
_SHOWN_CHARS = 160  # of a document, in the text


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
        lines += [f"{'':<11} {line}" for line in _counted(split, tokenizer["vocab_size"])]
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
    files = source.pop("files")
    more = f" and {len(files) - 10:,} more" if len(files) > 10 else ""
    yield f"directory   {directory}, format version {manifest['format_version']}"
    yield f"input       {len(files):,} files: {', '.join(files[:10])}{more}"
    yield f"            {', '.join(f'{name} {value!r}' for name, value in source.items())}"
    yield from summary(manifest)
    yield (
        f"ends        BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}; texts begin with "
        f"{tokenizer.start_ids or 'no token'}"
    )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            size = f"{shard['tokens']:,} tokens, {shard['bytes']:,} bytes"
            yield f"shard       {shard['file']}: {size}"


class Section(NamedTuple):
    """A table with a title, for the text and for the page. head: empty where rows are facts."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def sections(found: dict[str, Any]) -> Iterator[Section]:
    """Yield the tables of what `inspect` found; those without rows are left out."""
    yield Section("Findings", (), [(text,) for text in findings(found)])
    for name, split in found["splits"].items():
        yield Section(f"{name}: what is in it", (), [*_facts(split)])
        yield from (table for table in _documents(name, split) if table.rows)
    references = found["overlap"]["references"]
    if references:
        yield Section(
            f"Found in train, by {found['overlap']['ngram_tokens']} successive tokens",
            ("text", "rows", "too short", "n-grams found", "rows half found", "rows found whole"),
            [
                (r["reference"], r["rows"], r["short_rows"], f"{r['share']:.2%}",
                 r["rows_half_found"], r["rows_found_whole"])
                for r in references
            ],
        )  # fmt: skip
    worst = [(w["place"], f"{w['share']:.0%}", w["train_token"], w["text"])
             for r in references for w in r["worst"]]  # fmt: skip
    if worst:
        head = ("row", "found", "at train token", "begins")
        yield Section("Rows found in train", head, worst)
    if left_out := found["left_out"].get("first"):
        rows = [(problem,) for problem in left_out]
        count = found["left_out"]["rows"]
        yield Section(f"Left out: {count:,} rows, of which the first", (), rows)


def findings(found: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about each thing that harms a training or its evaluation."""
    for name, split in found["splits"].items():
        copies, read = split["duplicates"], split["read_documents"]
        if copies["copies"]:
            share = copies["copied_tokens"] / split["read_tokens"]
            yield (
                f"{name}: {copies['copies']:,} of {read:,} documents ({share:.2%} of the tokens) "
                "are exact copies of an earlier one"
            )
        if copies["near_copies"]:
            yield (
                f"{name}: {copies['near_copies']:,} of {copies['compared']:,} different documents "
                "are nearly the same as an earlier one"
            )
        if shared := split.get("copies_of_train"):
            yield f"{name}: {shared:,} of {read:,} documents are in train as well"
        for what, figure in split["order"].items():
            if figure and figure["correlation"] > max(
                _ALIKE, _ALIKE_ERRORS * figure["standard_error"]
            ):
                yield (
                    f"{name}: not shuffled: successive documents are alike in {what} (correlation "
                    f"{_correlation(figure)}). Training shuffles samples, not documents: one holds "
                    f"{split['packing']['documents_per_sample']:.1f} neighbors; shuffle the input"
                )
        if odd := split["outliers"]["documents"]:
            yield (
                f"{name}: {odd:,} documents are unlike the rest in their tokens or bytes per token:"
                " another language, tables, code"
            )
    for r in found["overlap"]["references"]:
        if half := r["rows_half_found"]:
            yield f"train holds at least half of {half:,} of {r['rows']:,} rows of {r['reference']}"


def _correlation(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "too few documents to tell"
    return f"{figure['correlation']:.3f}, of a shuffled set 0 ± {figure['standard_error']:.3f}"


def _facts(split: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the figures of a split."""
    read, whole = split["read_documents"], split["documents"]
    if not split["complete"]:
        yield (
            "sample",
            f"{read:,} of {whole:,} documents were read ({split['read_tokens']:,} of "
            f"{split['tokens']:,} tokens): a copy or an overlap outside of them is not seen; "
            "--max_tokens=none reads all",
        )
    if long := split["truncated_documents"]:
        yield "truncated", f"of {long:,} documents the first {MAX_DOCUMENT:,} tokens were looked at"
    lengths = split["lengths"]
    yield "tokens a document", ", ".join(f"{k} {round(n):,}" for k, n in lengths.items())
    yield "bytes per token", f"{split['bytes_per_token']:.2f}"
    packing, vocabulary = split["packing"], split["vocabulary"]
    yield (
        f"samples of {packing['seq_len']:,}",
        f"no padding, {packing['documents_per_sample']:.1f} documents in each; "
        f"{packing['cut_documents']:.1%} of the documents are cut, "
        f"{packing['longer_documents']:.1%} are longer than a sample; "
        f"{packing['unread_tokens']:,} tokens at the end are not read; "
        f"one document a row would be {packing['padding_unpacked']:.1%} padding",
    )
    used, frequent = vocabulary["used"], vocabulary["most_frequent"]
    yield (
        "vocabulary",
        f"{used:,} of {vocabulary['size']:,} tokens occur ({used / vocabulary['size']:.1%}), "
        f"{vocabulary['rare']:,} of them less than 10 times; {vocabulary['cover_99_percent']:,} "
        "make up 99 % of the text; most frequent: "
        + ", ".join(f"{t['text'] or t['id']!r} {t['share']:.1%}" for t in frequent),
    )
    copies = split["duplicates"]
    yield (
        "copies",
        f"{copies['copies']:,} documents are exact copies; of {copies['compared']:,} different "
        f"ones {copies['near_copies']:,} are nearly the same as an earlier one",
    )
    yield (
        "order",
        "correlation of successive documents: "
        + "; ".join(f"{what} {_correlation(f)}" for what, f in split["order"].items()),
    )
    yield "unlike the rest", f"{split['outliers']['documents']:,} documents"


def _documents(name: str, split: dict[str, Any]) -> Iterator[Section]:
    """Yield the tables of single documents of a split."""
    copies = split["duplicates"]
    rows = [(d["count"], d["token"], d["length"], d["text"]) for d in copies["most_frequent"]]
    yield Section(
        f"{name}: most frequent documents", ("times", "at token", "tokens", "begins"), rows
    )
    rows = [(f"{d['similarity']:.0%}", d["token"], d["earlier_token"], d["length"], d["text"])
            for d in copies["nearest"]]  # fmt: skip
    head = ("alike", "at token", "earlier one at", "tokens", "begins")
    yield Section(f"{name}: nearly the same", head, rows)
    rows = [(f"{d['distance']:.1f}", f"{d['unigram_loss']:.2f}", f"{d['bytes_per_token']:.2f}",
             d["token"], d["length"], d["text"])
            for d in split["outliers"]["farthest"]]  # fmt: skip
    head = ("deviations", "unigram loss", "bytes per token", "at token", "tokens", "begins")
    yield Section(f"{name}: unlike the rest", head, rows)
    for sample in split["samples"]:
        rows = [
            (p["token"], p["length"], "begins" if p["begins"] else "goes on",
             "ends" if p["ends"] else "is cut", p["text"])
            for p in sample["parts"]
        ]  # fmt: skip
        head = ("at token", "tokens", "it", "and", "text")
        yield Section(f"{name}: documents in sample {sample['number']:,}", head, rows)


def text_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the tables as text."""
    for title, head, rows in sections(found):
        yield f"\n{title}" + ("" if rows else ": none")
        cells = [[_shown(cell)[:_SHOWN_CHARS] if head else _shown(cell) for cell in row]
                 for row in ([head] if head else []) + rows]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            line = "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True))
            yield f"  {line.rstrip()}"


def to_html(found: dict[str, Any]) -> str:
    """Return the tables as a page that needs nothing else."""
    body = [f"<header><h1>{html.escape(found['directory'])}</h1></header>"]
    for title, head, rows in sections(found):
        body.append(f'<section class="card"><h2>{html.escape(title)}</h2>')
        body.append('<div class="scroll"><table>' if rows else "<p>none</p>")
        if rows:
            body += [_row(head, "th")] * bool(head) + [_row(row, "td") for row in rows]
            body.append("</table></div>")
        body.append("</section>")
    return static_page(found["directory"], "\n".join(body))


def _row(cells: Sequence[Any], tag: str) -> str:
    return "".join(["<tr>", *(f"<{tag}>{html.escape(_shown(c))}</{tag}>" for c in cells), "</tr>"])


def _shown(cell: Any) -> str:
    """Return a number with commas, and text on one line."""
    return f"{cell:,}" if isinstance(cell, int) else " ".join(str(cell).split())
