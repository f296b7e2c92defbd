"""What the evaluations of a run read: its validation sets, tasks and prompts."""

import dataclasses
from collections.abc import Mapping, Sequence

from llamajax import data
from llamajax.config import RunConfig, stages_of
from llamajax.decoding.prompts import Prompt, as_prompt, text_ids
from llamajax.evaluation.task_files import Tasks, open_tasks
from llamajax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """What evaluations read besides the model.

    own: the validation split of `data.path`, if there is one. named: the sets of `data.validation`.
    prompts: of `train.sample_prompts`. tokenizer: None without prompts and tasks.
    """

    own: "data.Mixture | None" = None
    named: "Mapping[str, data.Mixture]" = dataclasses.field(default_factory=dict)
    prompts: Sequence[Prompt] = ()
    tokenizer: Tokenizer | None = None
    tasks: Tasks | None = None

    @property
    def sets(self) -> "dict[str, data.Mixture]":
        """All validation sets by name; that of the own split is empty."""
        return ({"": self.own} if self.own else {}) | dict(self.named)

    @property
    def facts(self) -> dict[str, str]:
        """Describe what all processes must have in common."""
        found = {} if self.tasks is None else {"the files of train.tasks": self.tasks.digest}
        for name, split in self.sets.items():
            where = f"the data of {name} in data.validation"
            found[where if name else "the validation data in data.path"] = split.describe()
        return found

    @property
    def described(self) -> str | None:
        """Describe what `eval_loss` is of; None where there is no validation set."""
        if self.own:
            return "the validation split of data.path"
        return "all targets of data.validation" if self.named else None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to evaluate."""
        return not self.sets and self.tasks is None and not self.prompts


def open_evaluation_inputs(config: RunConfig, mixture: "data.Mixture") -> EvaluationInputs:
    """Open what the evaluations of a run on `mixture` read. Raises UserError."""
    own = None
    if data.has_split(config.data, "validation"):
        size = config.model.vocab_size
        own = data.open_mixture(config.data, split="validation", vocab_size=size)
    tokenizer = tasks = None
    if config.train.sample_prompts or config.train.tasks:
        tokenizer = data.load_tokenizer(mixture.sources[0].path)
    if config.train.tasks:
        shortest = min(stage.config.data.seq_len for stage in stages_of(config))
        tasks = open_tasks(config.train.tasks, tokenizer, seq_len=shortest, label="train.tasks")
    return EvaluationInputs(
        own=own,
        named=data.open_validation_sets(config.data, mixture),
        prompts=[
            as_prompt(
                text_ids(text, tokenizer, "none"),
                config.model,
                config.train.sample_tokens,
                number=number,
                name=f"train.sample_prompts: {text!r}",
                flag="train.sample_tokens",
            )
            for number, text in enumerate(config.train.sample_prompts)
        ],
        tokenizer=tokenizer,
        tasks=tasks,
    )


def samples_problem(config: RunConfig, num_stages: int) -> str | None:
    """Return why the prompts of a run cannot be continued; None where they can.

    num_stages: of the mesh.
    """
    if not config.train.sample_prompts or num_stages == 1:
        return None
    return (
        f"no samples, as layers in {num_stages} pipeline stages cannot decode; set mesh.stage to 1"
    )
