"""The verb `prepare`: text files to a directory of token shards that `train` reads."""

import argparse
import os
import time
from pathlib import Path
from typing import Any, NoReturn

from llamajax.corpus import tasks
from llamajax.corpus.beam import prepare_on_beam
from llamajax.corpus.preparation import FORMATS, Settings, prepare
from llamajax.errors import UserError
from llamajax.monitoring.progress import BytesProgress
from llamajax.tokenizers.chat import CHAT_TEMPLATES
from llamajax.verbs import run_verb

_EXAMPLE = """example:
  python -m llamajax.prepare --input=books/ --tokenizer=train:8192 --output=data/books
  python -m llamajax.prepare --input='web-*.jsonl.zst' --tokenizer=tokenizer.model --output=data/web
  python -m llamajax.prepare --input=chats.jsonl --format=instructions --chat_template=llama3 \\
      --tokenizer=tokenizer.model --output=data/chats
a line of instructions, of which only the completion or the assistant's answers carry loss:
  {"prompt": "...", "completion": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""
_HOW = ("num_tasks", "task_index", "merge", "runner", "beam_options")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().rstrip()}; --help tells more")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llamajax prepare",
        description="Tokenise text once, into shards that training reads at any sequence length.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", required=True, metavar="GLOB[,GLOB]",
        help="files, globs or directories: .txt, .jsonl, .json (lines), .parquet, .tokens, .raw,"
        " each also .gz or .zst",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", required=True, metavar="TOK",
        help="a SentencePiece .model, a tiktoken tokenizer.model, a tokenizer.json, a directory"
        " with one, `byte`, or train:N (train N pieces on the input)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--format", default="text", choices=FORMATS,
        help="instructions: JSON lines of prompts and completions, or of chats, to finetune on the"
        " answers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--chat_template", default="none", choices=CHAT_TEMPLATES,
        help="how instructions become tokens; none: BOS prompt completion EOS, no chats",
    )  # fmt: skip
    parser.add_argument(
        "--text_key", default="text", help="key or column of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--clean", default="none", choices=("none", "wikitext"),
        help="wikitext: join the input's lines to whole articles and undo its @-@ marks",
    )  # fmt: skip
    parser.add_argument(
        "--validation_fraction", type=float, default=0.01, metavar="F",
        help="share of the text that is held out (default: %(default)s; 0: none)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes; changes speed only (default: the processors, here %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    _add_array(parser)
    return parser


def _add_array(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the work is done, not what comes of it: those of `_HOW`."""
    array = parser.add_argument_group(
        "on many machines",
        "The same command with --num_tasks=N and each of --task_index=0..N-1, in any order, and"
        " again after any failure; then once with --merge. Files are divided among tasks; the"
        " result is that of one process, byte for byte.",
    )
    array.add_argument("--num_tasks", type=int, metavar="N", help="number of tasks")
    array.add_argument("--task_index", type=int, metavar="I", help="do this one, into DIR.parts")
    array.add_argument(
        "--merge", action="store_true", help="make DIR of all parts, and remove DIR.parts"
    )
    array.add_argument(
        "--runner", default="local", choices=("local", "beam"),
        help="beam: the tasks (one a file, or --num_tasks) as a pipeline of Apache Beam; storage is"
        " shared with its workers",
    )  # fmt: skip
    array.add_argument(
        "--beam_options", default="", metavar="K=V,...",
        help="options of the pipeline, as runner=FlinkRunner,parallelism=8 (default: Beam's own"
        " local runner)",
    )  # fmt: skip


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
        lines.append(f"to beat     {loss:.3f} nats a token: validation under train's unigrams")
    return "\n".join([*lines, f"wrote       {output} in {seconds:.1f} s"])


def main(argv: list[str]) -> int:
    """Exit code of the verb with these arguments. Raises UserError."""
    given = vars(_parser().parse_args(argv))
    how = {name: given.pop(name) for name in _HOW}
    settings = Settings(**(given | {"output": Path(given["output"])}))
    progress, start = BytesProgress(), time.monotonic()
    try:
        manifest = _carried_out(settings, progress, **how)
    finally:
        progress.close()
    if isinstance(manifest, str):
        print(manifest, flush=True)
    else:
        print(_summary(manifest, settings.output, time.monotonic() - start), flush=True)
    return 0


def _carried_out(
    settings: Settings,
    progress: BytesProgress,
    *,
    num_tasks: int | None,
    task_index: int | None,
    merge: bool,
    runner: str,
    beam_options: str,
) -> dict[str, Any] | str:
    """The manifest of what was made; of one task, what to say of it."""
    if runner == "beam":
        if task_index is not None or merge:
            raise UserError("--runner=beam runs all tasks and merges: no --task_index, no --merge")
        return prepare_on_beam(
            settings, num_tasks=num_tasks, options=beam_options, progress=progress
        )
    if beam_options:
        raise UserError("--beam_options needs --runner=beam")
    if num_tasks is None:
        if task_index is not None or merge:
            raise UserError("--task_index and --merge need --num_tasks, the same in all commands")
        return prepare(settings, progress)
    if (task_index is not None) == merge:
        raise UserError(
            f"--num_tasks={num_tasks} needs one of --task_index=0..{num_tasks - 1} and --merge"
        )
    if merge:
        return tasks.merge(settings, num_tasks=num_tasks, progress=progress)
    return tasks.run_task(settings, index=task_index, num_tasks=num_tasks, progress=progress)


if __name__ == "__main__":
    run_verb(main)
