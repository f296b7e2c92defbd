"""The flags of `evaluate`, checked as far as that needs neither a model nor a machine; no jax."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from llamajax.config import WeightsFlags, key
from llamajax.config.forms import check_output

Protocol = Literal["non_overlapping", "sliding_window"]
SOURCES = ("data", "text", "token_ids", "tasks", "harness")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(WeightsFlags):
    """One evaluation."""

    data: str | None = key(
        "directory written by llamajax.prepare, packed with document masks as in training: every "
        "token of a document but its BOS is a target once. Of instructions those of the answers, "
        "and examples are whole, however the model was trained",
        metavar="PREPARED",
        default=None,
        is_path=True,
    )
    split: str | None = key(
        "with --data: the split to read; none: validation", metavar="NAME", default=None
    )
    text: str | None = key(
        "UTF-8 text, also .gz or .zst: all of it as one document with one BOS before it, read by "
        "the checkpoint's tokenizer; every token but the BOS is a target once",
        metavar="FILE",
        default=None,
        is_path=True,
    )
    token_ids: str | None = key(
        "integers (T,) or (B, T), used exactly as given, without BOS or windows; each row on its "
        "own, its first token is context alone",
        metavar="FILE.npy",
        default=None,
        is_path=True,
    )
    tasks: tuple[str, ...] | None = key(
        "multiple choice: files of JSON lines, each with question, choices and answer (an index, a "
        "letter, or the text); a task is named like its file (docs/evaluation.md)",
        metavar="FILE.jsonl,...",
        default=None,
        is_path=True,
    )
    harness: tuple[str, ...] | None = key(
        "tasks of EleutherAI's lm-evaluation-harness; needs the extra llamajax[harness]",
        metavar="TASK,...",
        default=None,
    )
    harness_tasks: str | None = key(
        "with --harness: directory of further tasks (YAML)",
        metavar="DIR",
        default=None,
        is_path=True,
    )
    num_fewshot: int | None = key(
        "with --harness: examples before each question; none: as the task says",
        metavar="N",
        default=None,
        at_least=0,
    )
    limit: int | None = key(
        "with --harness: first questions of each task; none: all",
        metavar="N",
        default=None,
        at_least=1,
    )
    protocol: Protocol | None = key(
        "with --text. non_overlapping: window j reads tokens j*L to j*L + L - 1 of the text "
        "(L = --seq_len) and predicts the token after each, so that its first token, the last "
        "target of the window before, is context alone; the last window reads the last L tokens "
        "and scores those that are left (lm-evaluation-harness's rolling log-likelihood; figures "
        "in the manner of GPTQ leave out the last target of every window, and what is left). "
        "sliding_window: windows of L tokens begin every --stride tokens, and each scores only "
        "what no window before it scored, with at least L - stride tokens of context (Hugging "
        "Face's guide to perplexity of fixed-length models). none: non_overlapping",
        metavar="NAME",
        default=None,
    )
    seq_len: int | None = key(
        "tokens a row or window; none: with --data that of the run which made the checkpoint, with "
        "--tasks and --harness the model's context, else that, at most 4096",
        metavar="N",
        default=None,
        at_least=1,
    )
    stride: int | None = key(
        "with sliding_window: tokens between windows, below --seq_len; none: half of it",
        metavar="N",
        default=None,
        at_least=1,
    )
    batch_size: int | None = key(
        "rows at a time, rounded up to the devices; changes memory and speed only; none: about "
        "8,192 tokens a device",
        metavar="N",
        default=None,
        at_least=1,
    )
    max_batches: int | None = key(
        "stop after so many batches; none: all", metavar="N", default=None, at_least=1
    )
    per_token_nll: str | None = key(
        "write the loss of every target in nats, float32: (B, T - 1) for --token_ids, else (1, "
        "number of targets) in the order of the text; of instructions row by row, as packed",
        metavar="OUT.npy",
        default=None,
        is_path=True,
        check=check_output,
    )

    @property
    def source(self) -> str:
        """Which of SOURCES was given."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        given = [f"--{name}" for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            yield (
                f"{' and '.join(given) or 'no source'} given: name exactly one of "
                "--data=PREPARED, --text=FILE, --token_ids=FILE.npy, --tasks=FILE.jsonl and "
                "--harness=TASK"
            )
        else:
            yield from _of_another_source(self)
        if self.stride is not None and self.protocol != "sliding_window":
            yield "--stride belongs to --protocol=sliding_window"


def _of_another_source(flags: EvaluateOptions) -> list[str]:
    serves = {
        "split": ("data",),
        "protocol": ("text",),
        "seq_len": ("data", "text", "tasks", "harness"),
        "harness_tasks": ("harness",),
        "num_fewshot": ("harness",),
        "limit": ("harness",),
        "max_batches": ("data", "text", "token_ids"),
        "per_token_nll": ("data", "text", "token_ids"),
    }
    problems = [
        f"--{name}={getattr(flags, name)} does not go with --{flags.source}: it belongs to "
        + " and ".join(f"--{source}" for source in sources)
        for name, sources in serves.items()
        if getattr(flags, name) is not None and flags.source not in sources
    ]
    if flags.source == "token_ids" and flags.per_token_nll and flags.max_batches:
        problems.append(
            "--max_batches with --per_token_nll: the file has one value for each token of "
            "--token_ids; give fewer rows instead"
        )
    return problems
