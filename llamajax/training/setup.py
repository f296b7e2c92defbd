"""What a run consists of before any memory is taken: machine, mesh, data, and what follows."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from llamajax import backends, data, sharding
from llamajax.config import RunConfig, common_values, stage_named, stages_of
from llamajax.errors import UserError
from llamajax.evaluation.evaluation_inputs import (
    EvaluationInputs,
    open_evaluation_inputs,
    samples_problem,
)
from llamajax.models.llama import Compute
from llamajax.models.machine_choices import (
    check_mesh,
    proven_attention,
    resolve_compiler_options,
    resolve_compute,
    with_loss_chunk,
)
from llamajax.ops.attention import AttentionChoice
from llamajax.ops.attention_own import prove
from llamajax.processes import process_facts
from llamajax.processes.host_collectives import raising_together
from llamajax.training.state import StateSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run, or one of its stages, consists of before any memory is taken.

    config: of a stage it is that of `Stage`. stages: of a run, each with its first step, the first
    at step 0; empty in a stage.
    """

    config: RunConfig
    machine: backends.Machine
    mesh: Mesh
    attention: AttentionChoice
    compute: Compute
    compiler_options: backends.CompilerOptions
    spec: StateSpec
    mixture: "data.Mixture"
    evaluated: EvaluationInputs
    stages: "tuple[tuple[int, Setup], ...]" = ()

    def stage_number(self, step: int) -> int:
        """Return the number, from 0, of the stage that update `step` belongs to."""
        return sum(first_step < step for first_step in self.borders)

    def at(self, step: int) -> "Setup":
        """Return the stage that update `step` belongs to; of step 0 the first."""
        return self.stages[self.stage_number(step)][1]

    def stages_from(self, step: int) -> "list[tuple[int, int, Setup]]":
        """Return number, first step, and setup of the stages that have update `step` or later."""
        found = [(number, *stage) for number, stage in enumerate(self.stages)]
        return found[self.stage_number(step) :]

    @property
    def borders(self) -> list[int]:
        """The first steps of the stages but the first."""
        return [first_step for first_step, _ in self.stages[1:]]

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows update `step`."""
        every, last = self.config.train.eval_every, self.config.train.steps
        due = step == last or bool(every and step % every == 0)
        return due and not self.evaluated.is_empty

    def tokens_of(self, step: int) -> int:
        """Return the tokens that update `step` reads."""
        config = self.at(step).config.data
        return config.global_batch_size * config.seq_len

    @property
    def mixtures(self) -> "dict[str, data.Mixture]":
        """What is read in training, by hash."""
        return {stage.mixture.hash: stage.mixture for _, stage in self.stages}

    @property
    def data_settings(self) -> list[tuple[int, dict[str, Any]]]:
        """The first step of each stage, and its `Segment.settings` but the packing."""
        found = []
        for first_step, stage in self.stages:
            c, settings = stage.config.data, {"mixture_hash": stage.mixture.hash}
            settings |= {"batch_size": c.global_batch_size, "seq_len": c.seq_len}
            found.append((first_step, settings))
        return found

    @property
    def data_record(self) -> dict[str, str]:
        """What is read, by split, as checkpoints record it."""
        found = {"train": self.mixture.describe()}
        for number, (_, stage) in enumerate(self.stages[1:]):
            if stage.mixture.hash != self.mixture.hash:
                found[f"data.stages[{number}]"] = stage.mixture.describe()
        for name, split in self.evaluated.sets.items():
            found[f"validation set {name}" if name else "validation"] = split.describe()
        return found


def set_up(config: RunConfig, *, keep_programs: bool = True) -> Setup:
    """Start the machine and check everything against it. UserError for what a user can fix.

    keep_programs: in the compile cache.
    """
    mixtures: list[data.Mixture] = []
    refusal, evaluated = None, EvaluationInputs()
    try:
        mixtures += data.open_stages(config)
        evaluated = open_evaluation_inputs(config, mixtures[0])
    except UserError as error:
        refusal = error  # raised below, after the other processes have received it

    def common_facts() -> dict[str, str | None]:
        """Describe what all processes of a run must have in common."""
        facts = {**common_values(config), "problem": refusal and str(refusal)}
        for number, mixture in enumerate(mixtures):
            name = f"data.stages[{number - 1}]" if number else "data.path"
            facts[f"the train data in {name}"] = mixture.describe()
        facts |= evaluated.facts
        if mixtures:
            facts["the tokenizer in data.path"] = mixtures[0].tokenizer_fingerprint[:12]
        facts["XLA_FLAGS and LIBTPU_INIT_ARGS"] = backends.compiler_flags()
        return facts | process_facts.versions()

    machine = backends.start(config.backend, keep_programs=keep_programs, facts=common_facts)
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    for number, stage in enumerate(stages_of(config)):
        with stage_named(number):
            check_mesh(stage.config, mesh)
    if refusal is not None:
        raise refusal
    if samples_problem(config, mesh.shape["stage"]):  # which the header of the run says
        evaluated = dataclasses.replace(evaluated, prompts=())
    config = with_loss_chunk(config, machine.platform, mesh.shape)
    proven = functools.cache(prove)  # the same in all stages of one length

    stages = []
    with raising_together():  # code of the user's can fail on one process alone
        spec = StateSpec.of(config, mesh)
        for stage, mixture in zip(stages_of(config), mixtures, strict=True):
            attention = proven_attention(stage.config, machine, mesh, prove=proven)
            resolved = Setup(
                config=stage.config,
                machine=machine,
                mesh=mesh,
                attention=attention,
                compute=resolve_compute(stage.config, mesh, attention.impl),
                compiler_options=resolve_compiler_options(stage.config, machine, mesh),
                spec=dataclasses.replace(spec, model=stage.config.model),
                mixture=mixture,
                evaluated=evaluated,
            )
            stages.append((stage.first_step, resolved))
    return dataclasses.replace(stages[0][1], config=config, stages=tuple(stages))
