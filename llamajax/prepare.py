"""Tokenize text once, into shards that training reads at any sequence length.

On many machines: run the same command with --num_tasks=N and each of --task_index=0..N-1, in any
order, and again after any failure; then once with --merge. Files are divided among tasks; the
shards are those of one process, byte for byte.

A line of instructions, of which only the completion or the assistant's answers carry loss:
  {"prompt": "...", "completion": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Example:
  python -m llamajax.prepare --input=books/ --tokenizer=train:4096 --output=data/books
  python -m llamajax.prepare --input='web-*.jsonl.zst' --tokenizer=tokenizer.model --output=data/web
  python -m llamajax.prepare --input=chats.jsonl --format=instructions --chat_template=llama3 \\
      --tokenizer=tokenizer.model --output=data/chats
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax.config import Flags, key, parse_command_line
from llamajax.corpus import tasks
from llamajax.corpus.beam import prepare_on_beam
from llamajax.corpus.inspection import inspect_directory, summary
from llamajax.corpus.preparation import prepare
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.monitoring.progress import BytesProgress
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectFlags(Flags):
    """The flag that shows a prepared directory; it stands alone."""

    inspect: str = key("show what a prepared directory holds", metavar="DIR", is_path=True)


def main(argv: list[str]) -> int:
    """Write the prepared directory, or a part of it, or show one; return 0."""
    if any(argument.startswith("--inspect") for argument in argv):
        shown = parse_command_line(argv, InspectFlags, verb="prepare", doc=__doc__)
        print(inspect_directory(Path(shown.inspect)), flush=True)
        return 0
    options = parse_command_line(argv, PrepareOptions, verb="prepare", doc=__doc__)
    progress, start = BytesProgress(), time.monotonic()
    try:
        result = _work(options)(options, progress)
    finally:
        progress.close()
    if not isinstance(result, str):
        seconds = time.monotonic() - start
        result = "\n".join([*summary(result), f"wrote       {options.output} in {seconds:.1f} s"])
    print(result, flush=True)
    return 0


def _work(options: PrepareOptions) -> Callable[[PrepareOptions, BytesProgress], Any]:
    """Return what is to be done: it returns a manifest; after one task, a sentence about it."""
    if options.runner == "beam":
        return prepare_on_beam
    if options.num_tasks is None:
        return prepare
    return tasks.merge if options.merge else tasks.run_task


if __name__ == "__main__":
    run_verb(main)
