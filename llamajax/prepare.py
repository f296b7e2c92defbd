"""Tokenize text once, into shards that training reads at any sequence length.

On many machines: run the same command with --num_tasks=N and each of --task_index=0..N-1, in any
order, and again after any failure; then once with --merge. Files are divided among tasks; the
result is that of one process, byte for byte.

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
from llamajax.corpus.preparation import FORMATS, PrepareSettings, prepare
from llamajax.monitoring.progress import BytesProgress
from llamajax.tokenizers.chat import CHAT_TEMPLATES
from llamajax.verbs import run_verb


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
            of_others = {"text_key": "text", "clean": "none"}
        useless = [f"--{name}" for name, value in of_others.items() if getattr(self, name) != value]
        if useless:
            yield f"--format={self.format} has no use for {', '.join(useless)}"
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
    """Write the prepared directory, or a part of it; return 0."""
    flags = parse_command_line(argv, PrepareFlags, verb="prepare", doc=__doc__)
    content = {f.name: getattr(flags, f.name) for f in dataclasses.fields(PrepareSettings)}
    workers = flags.workers or len(os.sched_getaffinity(0))
    settings = PrepareSettings(**content | {"output": Path(flags.output), "workers": workers})
    progress, start = BytesProgress(), time.monotonic()
    try:
        result = _prepare(settings, flags, progress)
    finally:
        progress.close()
    if not isinstance(result, str):
        result = _summary(result, settings.output, time.monotonic() - start)
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


def _summary(manifest: dict[str, Any], output: Path, seconds: float) -> str:
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
    if "validation" in manifest["splits"]:
        loss = manifest["splits"]["validation"]["unigram_loss"]
        lines.append(
            f"baseline    {loss:.3f} nats per token: validation, by train's token frequencies"
        )
    return "\n".join([*lines, f"wrote       {output} in {seconds:.1f} s"])


if __name__ == "__main__":
    run_verb(main)
