"""The programs of a run: compiled for all its stages (`data.stages`) before the first update."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import named_leaves
from llamajax.config import ModelConfig, RunConfig, stage_named
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import Sampling
from llamajax.errors import UserError
from llamajax.evaluation.scoring import token_scores
from llamajax.formats.load_model import LoadedModel
from llamajax.models.llama import Compute
from llamajax.models.machine_choices import resolve_compiler_options
from llamajax.monitoring.row_format import format_size
from llamajax.training.feed import abstract_batch, eval_batch_size
from llamajax.training.safety.canary import Canary
from llamajax.training.setup import Setup
from llamajax.training.state import TrainState
from llamajax.training.step import eval_step, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a stage of a run compiles, once for a process.

    digest: of the update's program before XLA sees it; a plan of the same run has the same.
    """

    digest: str
    update: Callable  # (state, batch) -> (state, metrics); the state is donated
    evaluate: Callable  # (model, batch) -> (summed loss, number of targets)
    score: Callable | None  # (model, batch) -> TokenScores; where there are tasks
    canary: Canary | None
    weight_names: tuple[str, ...]  # of what is trained, in the order of the norms in the metrics


def lower_update(
    config: RunConfig,
    mesh: Mesh,
    compute: Compute,
    optimizer: optax.GradientTransformation,
    state: TrainState,
) -> jax.stages.Lowered:
    """Return the program of a run's update, not yet compiled; the state may be abstract."""
    update = train_step(optimizer, config.optim, config.train, compute, mesh, config.guard)
    batch = abstract_batch(config.data, mesh, batch_size=config.data.global_batch_size)
    return update.lower(state, batch)


def program_digest(lowered: jax.stages.Lowered) -> str:
    """Return a digest of a program before XLA sees it."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def compile_programs(stage: Setup, state: TrainState) -> Programs:
    """Compile the programs of a stage for states like this one."""
    config, mesh = stage.config, stage.mesh
    eval_batch = abstract_batch(config.data, mesh, batch_size=eval_batch_size(config))
    update = lower_update(config, mesh, stage.compute, stage.spec.optimizer, state)
    evaluate = eval_step(stage.compute, mesh).lower(state.whole, eval_batch)
    scores = None
    if stage.evaluated.tasks is not None:
        inputs = {name: array for name, array in eval_batch.items() if name != "loss_mask"}
        scores = token_scores(stage.compute, mesh).lower(state.whole, inputs)
    canary = None
    if config.guard.canary_every is not None:
        # Microbatches of the size that training has.
        parts = config.train.accumulation_steps * sharding.batch_shards(mesh)
        canary = Canary(
            state,
            mesh,
            stage.compute,
            rows=max(config.data.global_batch_size // parts, 1),
            seq_len=config.data.seq_len,
            options=resolve_compiler_options(config, stage.machine, mesh, deterministic=True),
        )
    compiled = stage.compiler_options.compile
    return Programs(
        digest=program_digest(update),
        update=compiled(update),
        evaluate=compiled(evaluate),
        score=None if scores is None else compiled(scores),
        canary=canary,
        weight_names=tuple(named_leaves(state.trained)),
    )


@dataclasses.dataclass(frozen=True)
class RunPrograms:
    """The programs of a run; stages with the same shapes share them.

    decoding: those of `Engine`, which continue the prompts of a run, by model: the rope scaling of
    a stage is a part of it.
    """

    setup: Setup
    by_shapes: dict[tuple, Programs] = dataclasses.field(default_factory=dict)
    decoding: dict[ModelConfig, dict[tuple, Any]] = dataclasses.field(default_factory=dict)

    def at(self, step: int) -> Programs:
        """Return the programs of the stage that update `step` belongs to."""
        return self.by_shapes[_shapes(self.setup.at(step))]

    def lacks(self, step: int) -> bool:
        """Return whether those of update `step` are not compiled; then those of later ones are."""
        return _shapes(self.setup.at(step)) not in self.by_shapes

    def compile(self, state: TrainState, *, step: int) -> list[Programs]:
        """Compile those of update `step` and of all stages after it; return what is new.

        state: of any step. So a stop signal never waits for XLA, and a stage that does not compile,
        or that the memory of a device does not hold, ends a run at its start.
        """
        new = []
        for number, _, stage in self.setup.stages_from(step):
            if _shapes(stage) in self.by_shapes:
                continue
            with stage_named(number):
                like = stage.spec.retyped(state)
                programs = compile_programs(stage, like)
                if number:  # the first finds out by itself, at once
                    _check_memory(stage, programs)
                if stage.evaluated.prompts:
                    self.sampler(stage, like).compile(stage.evaluated.prompts)
            self.by_shapes[_shapes(stage)] = programs
            new.append(programs)
        return new

    def sampler(self, stage: Setup, state: TrainState) -> Engine:
        """Return what continues the prompts of a run with the weights of a state of this stage."""
        config, model = stage.config, state.whole
        mesh = sharding.join_sequence(stage.mesh)  # rows are whole
        loaded = LoadedModel(
            machine=stage.machine,
            mesh=mesh,
            dtype=config.train.activation_dtype,
            model=sharding.same_parts(model, mesh),
        )
        engine = Engine(
            loaded,
            sampling=Sampling(temperature=config.train.sample_temperature),
            stop_ids=stage.evaluated.tokenizer.stop_ids,
        )
        engine.programs = self.decoding.setdefault(model.config, {})
        return engine

    def facts(self, *, step: int) -> dict[str, Any]:
        """Return what `run.json` says of several stages: those from update `step` on."""
        if len(self.setup.stages) == 1:
            return {}
        found = []
        for number, first_step, stage in self.setup.stages_from(step):
            programs = self.by_shapes[_shapes(stage)]
            fields = {"number": number, "first_step": first_step, "program": programs.digest}
            fields |= {"program_bytes": backends.program_bytes(programs.update)}
            found.append(fields | {"attention": stage.attention.impl})
        return {"stages": found}


def _shapes(stage: Setup) -> tuple:
    c = stage.config
    sizes = (c.data.seq_len, c.data.global_batch_size, c.train.accumulation_steps)
    return *sizes, c.model.rope_scaling, stage.attention.impl


def _check_memory(stage: Setup, programs: Programs) -> None:
    if platform_facts(stage.machine.platform).says_peak:
        return  # XLA for TPUs has refused what does not fit, by its own count
    needed, limit = backends.program_bytes(programs.update), backends.memory_limit_bytes()
    if needed and limit and needed > limit:
        raise UserError(
            f"its step needs {format_size(needed)} of a device's memory, which has "
            f"{format_size(limit)}: choose a smaller data.global_batch_size or data.seq_len, or "
            "more train.accumulation_steps (`llamajax plan` has the parts)"
        )
