"""The flags of `prepare`, checked before anything is read."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llamajax.config import Flags, key
from llamajax.tokenizers.chat import CHAT_TEMPLATES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(Flags):
    """Flags of `prepare`; those from `num_tasks` on say where the work is done."""

    input: str = key(
        "files, globs or directories: .txt, .jsonl, .json, .parquet, .arrow, .tokens, .raw, each "
        "also .gz or .zst; .bin, .npy of tokens; each with options of its own: text_key, clean, "
        "document_separator, split, into, config",
        metavar="GLOB[:KEY=VALUE][,GLOB]",
        is_path=True,
    )
    tokenizer: str = key(
        "a SentencePiece .model, a tiktoken tokenizer.model, a tokenizer.json, a directory with "
        "one, `byte`, or train:N (train N pieces on the input)",
        metavar="TOK",
        is_path=True,
    )
    output: str = key("directory to write", metavar="DIR", is_path=True)
    format: Literal["text", "instructions"] = key(
        "instructions: rows of prompts and completions, or of chats, to finetune on the answers",
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
        "look into a prepared directory; `--inspect=DIR --help` shows the flags that go with it",
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

    @property
    def directory(self) -> Path:
        """The directory to write."""
        return Path(self.output)

    @property
    def has_examples(self) -> bool:
        """Whether the input is instructions, of which only the answers carry loss."""
        return self.format == "instructions"

    @property
    def num_workers(self) -> int:
        """Processes that tokenize."""
        return self.workers or len(os.sched_getaffinity(0))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.validation_fraction <= 0.5:
            yield f"--validation_fraction={self.validation_fraction}: must lie in 0..0.5"
        of_others = {"chat_template": "none"}
        if self.has_examples:
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
