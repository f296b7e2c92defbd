"""Tokenize text once, into shards that training reads at any sequence length.

On many machines: run the same command with --num_tasks=N and each of --task_index=0..N-1, in any
order, and again after any failure; then once with --merge. Files are divided among tasks; the
shards are those of one process, byte for byte.

A row of instructions, of which only the completion or the assistant's answers carry loss:
  {"prompt": "...", "completion": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Example:
  python -m llamajax.prepare --input=books/ --tokenizer=train:4096 --output=data/books
  python -m llamajax.prepare --input='web-*.jsonl.zst' --tokenizer=tokenizer.model --output=data/web
  python -m llamajax.prepare --input='hf/wikitext,web/*.jsonl:text_key=content' \\
      --tokenizer=tokenizer.model --output=data/mix
  python -m llamajax.prepare --input=chats.jsonl --format=instructions --chat_template=llama3 \\
      --tokenizer=tokenizer.model --output=data/chats
  python -m llamajax.prepare --inspect=data/web --seq_len=4096 --against=questions.jsonl
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax.config import parse_command_line
from llamajax.corpus import tasks
from llamajax.corpus.beam import prepare_on_beam
from llamajax.corpus.inspection.directory_inspection import (
    document_text,
    inspect,
    open_directory,
)
from llamajax.corpus.inspection.inspect_options import InspectOptions
from llamajax.corpus.inspection.inspection_output import describe, summary, text_lines, to_html
from llamajax.corpus.preparation import prepare
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.files import write_file
from llamajax.monitoring.progress import BytesProgress
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Write the prepared directory, or a part of it, or show one; return 0."""
    if any(argument.startswith("--inspect") for argument in argv):
        _inspect(parse_command_line(argv, InspectOptions, verb="prepare", doc=__doc__))
        return 0
    options = parse_command_line(argv, PrepareOptions, verb="prepare", doc=__doc__)
    progress, start = BytesProgress(), time.monotonic()
    try:
        result = _work(options)(options, progress)
    finally:
        progress.close()
    if not isinstance(result, str):
        seconds = time.monotonic() - start
        wrote = f"wrote       {options.output} in {seconds:.1f} s"
        more = f"            --inspect={options.output} looks into the documents"
        result = "\n".join([*summary(result), wrote, more])
    print(result, flush=True)
    return 0


def _inspect(options: InspectOptions) -> None:
    """Print what is in a prepared directory, and write its page."""
    manifest, tokenizer = open_directory(options.directory)
    if options.at is not None:
        print(document_text(options.directory, manifest, tokenizer, token=options.at), flush=True)
        return
    progress = BytesProgress()
    try:
        found = inspect(options, progress)
    finally:
        progress.close()
    described = describe(options.directory, manifest, tokenizer)
    print(*described, *text_lines(found), sep="\n", flush=True)
    if options.json:
        text = json.dumps(found, indent=1) + "\n"
        write_file(Path(options.json), text, label=f"--json={options.json}")
    write_file(options.page, to_html(found), label=f"--html={options.page}")
    print(f"\nwrote {options.page}", flush=True)


def _work(options: PrepareOptions) -> Callable[[PrepareOptions, BytesProgress], Any]:
    """Return what is to be done: it returns a manifest; after one task, a sentence about it."""
    if options.runner == "beam":
        return prepare_on_beam
    if options.num_tasks is None:
        return prepare
    return tasks.merge if options.merge else tasks.run_task


if __name__ == "__main__":
    run_verb(main)
