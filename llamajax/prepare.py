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
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llamajax.config import Flags, key, parse_command_line
from llamajax.corpus import tasks
from llamajax.corpus.beam import prepare_on_beam
from llamajax.corpus.documents import Reading
from llamajax.corpus.inspection import inspect_directory, summary
from llamajax.corpus.preparation import FORMATS, PrepareSettings, prepare
from llamajax.monitoring.progress import BytesProgress
from llamajax.tokenizers.chat import CHAT_TEMPLATES
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectFlags(Flags):
    """The flag that shows a prepared directory; it stands alone."""

    inspect: str = key("show what a prepared directory holds", metavar="DIR", is_path=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareFlags(Flags):
    """Flags of `prepare`; those from `num_tasks` on say where the work is done."""

    input: str = key(
        "files, globs or directories: .txt, .jsonl, .json (lines), .parquet, .tokens, .raw, each "
        "also .gz or .zst",
        metavar="GLOB[,GLOB]",
        is_path=True,
    )
    tokenizer: str = key(
        "a SentencePiece .model, a tiktoken tokenizer.model, a tokenizer.json, a directory with "
        "one, `byte`, or train:N (train N pieces on the input)",
        metavar="TOK",
        is_path=True,
    )
    output: str = key("directory to write", metavar="DIR", is_path=True)
    format: Literal[FORMATS] = key(
        "instructions: JSON lines of prompts and completions, or of chats, to finetune on the "
        "answers",
        metavar="NAME",
        default="text",
    )
    chat_template: Literal[CHAT_TEMPLATES] = key(
        "how instructions become tokens; none: BOS prompt completion EOS, no chats",
        metavar="NAME",
        default="none",
    )
    text_key: str = key("key or column of the text", metavar="KEY", default="text")
    clean: Literal["none", "wikitext"] = key(
        "wikitext: join the input's lines to whole articles and undo its @-@ marks",
        metavar="NAME",
        default="none",
    )
    validation_fraction: float = key(
        "share of the text that is held out; 0: none", metavar="F", default=0.01
    )
    workers: int | None = key(
        "processes; changes speed only; none: one a processor",
        metavar="N",
        default=None,
        at_least=1,
    )
    overwrite: bool = key("replace DIR if it exists", default=False)
    document_separator: str = key(
        "ends a document within a .txt file; it is left out", metavar="S", default=""
    )
    on_error: Literal["stop", "skip"] = key(
        "skip: leave out rows that cannot be read or are no examples; count and name them",
        metavar="NAME",
        default="stop",
    )
    inspect: str | None = key(
        "show what a prepared directory holds; alone, without other flags",
        metavar="DIR",
        default=None,
    )
    num_tasks: int | None = key("number of tasks", metavar="N", default=None, at_least=1)
    task_index: int | None = key("do this task, into DIR.parts", metavar="I", default=None)
    merge: bool = key("make DIR of all parts, and remove DIR.parts", default=False)
    runner: Literal["local", "beam"] = key(
        "beam: the tasks (one a file, or --num_tasks) as a pipeline of Apache Beam; storage is "
        "shared with its workers",
        metavar="NAME",
        default="local",
    )
    beam_options: str = key(
        "options of the pipeline, as runner=FlinkRunner,parallelism=8; empty: Beam's own local "
        "runner",
        metavar="K=V,...",
        default="",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.validation_fraction <= 0.5:
            yield f"--validation_fraction={self.validation_fraction}: must lie in 0..0.5"
        of_others = {"chat_template": "none"}
        if self.format == "instructions":
            of_others = {"text_key": "text", "clean": "none", "document_separator": ""}
        useless = [f"--{name}" for name, value in of_others.items() if getattr(self, name) != value]
        if useless:
            yield f"--format={self.format} has no use for {', '.join(useless)}"
        if self.clean == "wikitext" and self.document_separator:
            yield "--clean=wikitext has no use for --document_separator: articles begin at titles"
        one_task = self.task_index is not None
        if self.runner == "beam":
            if one_task or self.merge:
                yield "--runner=beam runs all tasks and merges: no --task_index, no --merge"
            return
        if self.beam_options:
            yield "--beam_options needs --runner=beam"
        if self.num_tasks is None:
            if one_task or self.merge:
                yield "--task_index and --merge need --num_tasks, the same in all commands"
            return
        indices = f"0..{self.num_tasks - 1}"
        if one_task == self.merge:
            yield f"--num_tasks={self.num_tasks} needs one of --task_index={indices} and --merge"
        elif one_task and not 0 <= self.task_index < self.num_tasks:
            yield f"--task_index={self.task_index}: must lie in {indices}"


def main(argv: list[str]) -> int:
    """Write the prepared directory, or a part of it, or show one; return 0."""
    if any(argument.startswith("--inspect") for argument in argv):
        shown = parse_command_line(argv, InspectFlags, verb="prepare", doc=__doc__)
        print(inspect_directory(Path(shown.inspect)), flush=True)
        return 0
    flags = parse_command_line(argv, PrepareFlags, verb="prepare", doc=__doc__)
    settings = PrepareSettings(
        input=flags.input,
        tokenizer=flags.tokenizer,
        output=Path(flags.output),
        format=flags.format,
        chat_template=flags.chat_template,
        reading=Reading(*(getattr(flags, name) for name in Reading._fields)),
        validation_fraction=flags.validation_fraction,
        workers=flags.workers or len(os.sched_getaffinity(0)),
        overwrite=flags.overwrite,
    )
    progress, start = BytesProgress(), time.monotonic()
    try:
        result = _prepare(settings, flags, progress)
    finally:
        progress.close()
    if not isinstance(result, str):
        seconds = time.monotonic() - start
        result = "\n".join([*summary(result), f"wrote       {settings.output} in {seconds:.1f} s"])
    print(result, flush=True)
    return 0


def _prepare(
    settings: PrepareSettings, flags: PrepareFlags, progress: BytesProgress
) -> dict[str, Any] | str:
    """Return the manifest of the directory; after one task, a sentence about it."""
    num_tasks = flags.num_tasks
    if flags.runner == "beam":
        options = flags.beam_options
        return prepare_on_beam(settings, num_tasks=num_tasks, options=options, progress=progress)
    if num_tasks is None:
        return prepare(settings, progress)
    if flags.merge:
        return tasks.merge(settings, num_tasks=num_tasks, progress=progress)
    return tasks.run_task(settings, index=flags.task_index, num_tasks=num_tasks, progress=progress)


if __name__ == "__main__":
    run_verb(main)
