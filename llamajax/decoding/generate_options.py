"""The options of `generate`, checked as far as that needs no model and no machine. Free of jax."""

import dataclasses
import math
from pathlib import Path

from llamajax.config.schema import BackendConfig, ComputeDtype
from llamajax.errors import combine

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
        """Whether the tokens seen so far change the probabilities."""
        return self.repetition_penalty != 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The flags of `generate` by name, None where one was not given."""

    checkpoint: str
    backend: BackendConfig
    sampling: Sampling
    seed: int
    batch_size: int
    prompt: str | None = None
    prompts_file: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    interactive: bool = False
    chat_template: str = "none"  # the prompt is the user's message of such a chat
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    json: bool = False
    dtype: ComputeDtype | None = None
    mesh: str | None = None

    @property
    def streams(self) -> bool:
        """Whether text is printed as it comes."""
        return not self.json and self.prompts_file is None


def check_options(options: GenerateOptions) -> None:
    """Raise one UserError with every flag that is missing, out of range or contradicts another."""
    given = [f"--{name}" for name in SOURCES if getattr(options, name) not in (None, False)]
    problems = []
    if len(given) != 1:
        problems.append(
            f"{' and '.join(given) or 'no prompt'} given: name exactly one of --prompt=TEXT, "
            "--prompts_file=F, --prompt_ids=1,2,3 and --interactive"
        )
    if options.prompt_ids == ():
        problems.append("--prompt_ids is empty: name at least one token id; none is added to them")
    if options.prompt_ids is not None and options.chat_template != "none":
        problems.append("--chat_template is for texts: --prompt_ids are taken as they are")
    if options.prompts_file is not None:
        file = Path(options.prompts_file)
        if not file.exists() or file.is_dir():
            what = "is a directory" if file.is_dir() else "there is no such file"
            problems.append(f"--prompts_file={options.prompts_file}: {what}")
    for name in ("max_new_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name}={value}: must be at least 1")
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed={options.seed}: must be at least 0 and below 2**32")
    problems += _sampling_problems(options.sampling)
    if problems:
        raise combine(problems, title="nothing can be generated like this:")


def _sampling_problems(s: Sampling) -> list[str]:
    problems = []
    if s.temperature != 0 and not (math.isfinite(s.temperature) and s.temperature >= 1e-6):
        problems.append(f"--temperature={s.temperature}: must be 0 (greedy) or at least 1e-6")
    if s.top_k is not None and s.top_k < 1:
        problems.append(f"--top_k={s.top_k}: must be at least 1; leave it out for all tokens")
    if s.top_p is not None and not 0 < s.top_p <= 1:
        problems.append(f"--top_p={s.top_p}: must be above 0 and at most 1")
    if not (math.isfinite(s.repetition_penalty) and s.repetition_penalty > 0):
        problems.append(
            f"--repetition_penalty={s.repetition_penalty}: must be above 0; 1 changes nothing, "
            "1.2 is strong"
        )
    return problems
