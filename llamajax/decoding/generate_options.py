"""The flags of `generate`, checked as far as that needs neither a model nor a machine; no jax."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llamajax.config import WeightsFlags, key
from llamajax.tokenizers.chat import CHAT_TEMPLATES, OWN_TEMPLATE

SOURCES = ("prompt", "prompts_file", "prompt_ids", "interactive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the logits; temperature 0 takes the most probable one."""

    temperature: float
    top_k: int | None = None  # only the k most probable
    top_p: float | None = None  # only the most probable ones that together reach p
    repetition_penalty: float = 1.0  # of tokens in the prompt or the output; 1: none

    @property
    def penalizes(self) -> bool:
        """Whether the tokens seen so far matter."""
        return self.repetition_penalty != 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(WeightsFlags):
    """One session of `generate`."""

    prompt: str = key("text to continue, after a BOS; may be empty", metavar="TEXT", default=None)
    prompts_file: str | None = key(
        "a prompt a line, or JSON lines with a `prompt`; empty lines count for nothing",
        metavar="F",
        default=None,
        is_path=True,
    )
    prompt_ids: tuple[int, ...] | None = key(
        "token ids to continue, exactly these: no BOS, no tokenizer needed",
        metavar="1,2,3",
        default=None,
    )
    interactive: bool = key(
        "read prompts from the terminal or a pipe, one a line, each on its own; Ctrl-D leaves",
        default=False,
    )
    chat_template: Literal[(*CHAT_TEMPLATES, OWN_TEMPLATE)] = key(
        "not none: each prompt is the user's message in a chat of this form; model: in the form "
        "that the model's own template has",
        metavar="NAME",
        default="none",
    )
    max_new_tokens: int | None = key(
        "most new tokens a prompt; none: 128, or fewer where the context ends",
        metavar="N",
        default=None,
        at_least=1,
    )
    temperature: float = key(
        "0: the most probable token; 1: as the model says; in between: safer",
        metavar="X",
        default=0.0,
    )
    top_k: int | None = key(
        "draw among the K most probable tokens only", metavar="K", default=None, at_least=1
    )
    top_p: float | None = key(
        "draw among the most probable tokens that together reach probability P only",
        metavar="P",
        default=None,
    )
    repetition_penalty: float = key(
        "divides positive logits, and multiplies negative ones, of tokens in prompt or output; 1 "
        "changes nothing, 1.2 is strong",
        metavar="X",
        default=1.0,
        above=0,
    )
    seed: int = key(
        "of the random draws; the same text on every mesh and in every batch",
        metavar="S",
        default=0,
        at_least=0,
        below=2**32,
    )
    stop_ids: tuple[int, ...] = key(
        "token ids that end the text, besides EOS", metavar="1,2", default=()
    )
    ignore_eos: bool = key("whether to go on after EOS", default=False)
    json: bool = key(
        "print one JSON object a prompt, one line each: prompt_ids, output_ids (new tokens, the "
        "stop token included), text (null without a tokenizer)",
        default=False,
    )
    batch_size: int = key(
        "prompts of a file at a time; changes memory and speed only",
        metavar="N",
        default=8,
        at_least=1,
    )

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        return Sampling(**{name: getattr(self, name) for name in names})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        given = [f"--{name}" for name in SOURCES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            yield (
                f"{' and '.join(given) or 'no prompt'} given: name exactly one of --prompt=TEXT, "
                "--prompts_file=F, --prompt_ids=1,2,3 and --interactive"
            )
        if self.prompt_ids == ():
            yield "--prompt_ids is empty: name at least one token id; none is added to them"
        if self.prompt_ids is not None and self.chat_template != "none":
            yield "--chat_template is for texts: --prompt_ids are taken as they are"
        if self.prompts_file is not None:
            file = Path(self.prompts_file)
            if not file.exists() or file.is_dir():
                what = "is a directory" if file.is_dir() else "there is no such file"
                yield f"--prompts_file={file}: {what}"
        if self.temperature != 0 and not self.temperature >= 1e-6:
            yield f"--temperature={self.temperature}: must be 0 (greedy) or at least 1e-6"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top_p={self.top_p}: must be above 0 and at most 1"
