"""What a run needs besides its directory: machine, mesh, data, first state, compiled programs."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llamajax import backends, data, sharding
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import Checkpoint, check_same_model, named_leaves, restore_state
from llamajax.config import RunConfig, common_values, stage_named, stages_of, to_json_dict
from llamajax.errors import UserError
from llamajax.evaluation.scoring import token_scores
from llamajax.formats.weights import Weights
from llamajax.models.counts import matrices_per_layer
from llamajax.models.llama import Compute
from llamajax.models.memory import FLOAT32_BYTES
from llamajax.models.pipeline import PipelineOptions
from llamajax.ops.attention import AttentionChoice, choose_attention
from llamajax.ops.attention_own import is_own, prove
from llamajax.processes import process_facts
from llamajax.processes.host_collectives import raising_together
from llamajax.sharding.float8 import Float8
from llamajax.training.evaluation_inputs import EvaluationInputs, open_evaluation_inputs
from llamajax.training.feed import abstract_batch, eval_batch_size
from llamajax.training.safety.canary import Canary
from llamajax.training.state import StateSpec, TrainState, as_stored
from llamajax.training.step import eval_step, train_step

_LOSS_CHUNK_TOKENS = (512, 4096)  # the least and the most that are chosen


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

    @property
    def borders(self) -> list[int]:
        """The first steps of the stages but the first."""
        return [first_step for first_step, _ in self.stages[1:]]

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
        """The first step of each stage, and its settings in a position in the data."""
        packing = self.config.data.packing  # of auto a position knows more
        return [
            (
                first_step,
                {
                    "batch_size": stage.config.data.global_batch_size,
                    "seq_len": stage.config.data.seq_len,
                    "mixture_hash": stage.mixture.hash,
                    "packing": None if packing == "auto" else packing,
                },
            )
            for first_step, stage in self.stages
        ]

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
    config = with_loss_chunk(config, machine.platform, mesh.shape)
    proven = functools.cache(prove)  # the same in all stages of one length

    def resolved(config: RunConfig, mixture: data.Mixture) -> Setup:
        attention = resolve_attention(config, machine, mesh)
        if is_own(attention.impl):
            attention = _proven(attention.impl, config, mesh, proven)
        return Setup(
            config=config,
            machine=machine,
            mesh=mesh,
            attention=attention,
            compute=resolve_compute(config, mesh, attention.impl),
            compiler_options=resolve_compiler_options(config, machine, mesh),
            spec=dataclasses.replace(spec, model=config.model),
            mixture=mixture,
            evaluated=evaluated,
        )

    with raising_together():  # code of the user's can fail on one process alone
        spec = StateSpec.of(config, mesh)
        stages = [
            (stage.first_step, resolved(stage.config, mixture))
            for stage, mixture in zip(stages_of(config), mixtures, strict=True)
        ]
    return dataclasses.replace(stages[0][1], config=config, stages=tuple(stages))


def with_loss_chunk(config: RunConfig, platform: str, sizes: Mapping[str, int]) -> RunConfig:
    """Return the config with the platform's `train.loss_chunk_tokens` where it leaves them open.

    sizes: of the mesh axes. It is a power of two, so that it divides most numbers of tokens.
    """
    if config.train.loss_chunk_tokens is not None:
        return config
    tokens, room = _LOSS_CHUNK_TOKENS[0], platform_facts(platform).logits_bytes
    each = FLOAT32_BYTES * config.model.padded_vocab_size / sizes["tensor"]
    while room is not None and 2 * tokens * each <= room and tokens < _LOSS_CHUNK_TOKENS[1]:
        tokens *= 2
    train = dataclasses.replace(config.train, loss_chunk_tokens=tokens)
    return dataclasses.replace(config, train=train)


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raise one UserError with everything about the run that its mesh does not divide."""
    batch, seq_len = config.data.global_batch_size, config.data.seq_len
    sharding.check_divides(
        config.model.dims, mesh, batch=batch, seq_len=seq_len, train=config.train
    )


def resolve_attention(config: RunConfig, machine: backends.Machine, mesh: Mesh) -> AttentionChoice:
    """Return the attention of a run, for `auto` the first that the machine supports."""
    t = config.train
    facts = {
        "platform": machine.platform,
        "compute_capability": machine.compute_capability,
        "dtype": t.activation_dtype,
        "head_size": config.model.head_size,
        "seq_len": config.data.seq_len,
        "sequence_parts": mesh.shape["sequence"],
    }
    return choose_attention(t.attention, machine.attention_preferences, **facts)


def _proven(own: str, config: RunConfig, mesh: Mesh, prove: Callable) -> AttentionChoice:
    """Prove the user's own attention on this process's first device."""
    model, t, parts = config.model, config.train, mesh.shape["tensor"]
    found, is_named = prove(
        own,
        dtype=t.activation_dtype,
        heads=(model.num_heads // parts, model.num_kv_heads // parts),
        head_size=model.head_size,
        seq_len=config.data.seq_len,
        packed=config.data.mask_documents,
    )
    could_keep = t.remat not in ("none", "full") or "attention" in t.remat_keep
    reason, is_again = f"train.attention = {own}; {found}", could_keep and not is_named
    if is_again:
        reason += f'; it names nothing "attention", which train.remat = {t.remat} would keep'
    return AttentionChoice(own, reason, is_second_best=is_again)


def resolve_compute(config: RunConfig, mesh: Mesh, attention: str) -> Compute:
    """Return how a run computes with this attention."""
    t, float8 = config.train, None
    if t.dtype == "float8":
        float8 = Float8(
            targets=t.float8_targets, gradients=t.float8_gradients, scaling=t.float8_scaling
        )
    return Compute(
        dtype=jnp.dtype(t.activation_dtype),
        remat=t.remat,
        attention=attention,
        loss_chunk_tokens=t.loss_chunk_tokens,
        z_weight=t.z_loss,
        remat_keep=t.remat_keep,
        remat_offload=t.remat_offload,
        split_tokens=mesh.shape["tensor"] > 1,
        pipeline=PipelineOptions(
            microbatch_size=t.microbatch_size, rounds=t.pipeline_rounds, remat_stage=t.remat_stage
        ),
        float8=float8,
    )


def resolve_compiler_options(
    config: RunConfig, machine: backends.Machine, mesh: Mesh, *, deterministic: bool | None = None
) -> backends.CompilerOptions:
    """Return the options that the step of a run is compiled with, present devices or absent.

    deterministic: whether its bits are to be repeated; None: as `backend.deterministic` says.
    """
    if deterministic is None:
        deterministic = config.backend.deterministic
    return backends.choose_compiler_options(
        config.backend.compiler_options,
        platform=machine.platform,
        device=mesh.devices.flat[0],
        layer_bytes=4 * matrices_per_layer(config.model) / mesh.shape["tensor"],
        deterministic=deterministic,
    )


def initial_state(setup: Setup, stored: Checkpoint | None, weights: Weights | None) -> TrainState:
    """Return the first state: random, imported, restored, or restored adapters on imported weights.

    stored: the checkpoint to restore, if any. weights: to import. To be called by all processes.
    """
    spec, seed = setup.spec, setup.config.train.seed
    model = None if weights is None else weights.load(spec.abstract_model())
    if stored is not None:
        abstract = _abstract_stored(spec, stored)
        cast = bool(new_moment_dtypes(abstract, stored))
        keys = _model_keys(setup)
        saved = restore_state(stored, abstract, model=keys, cast=cast, donated=True)
        saved = spec.with_own_guard(saved)
        state = spec.with_own_average(saved if model is None else saved.replace(model=model))
    elif model is None:
        return spec.init(seed)
    else:
        state = spec.from_weights(model, seed)
    return spec.to_pipeline_order(state)


def check_stored(setup: Setup, stored: Checkpoint) -> None:
    """Raise UserError where a checkpoint is of another model or optimizer than the setup's."""
    state = _abstract_stored(setup.spec, stored)
    abstract, cast = named_leaves(state), bool(new_moment_dtypes(state, stored))
    check_same_model(stored, abstract, model=_model_keys(setup), partial=False, cast=cast)


def new_moment_dtypes(abstract: TrainState, stored: Checkpoint) -> list[str]:
    """Return the dtypes that moments of a checkpoint are converted to; none where all fit.

    In older checkpoints with first moments in bfloat16, the second are float32.
    """
    wanted, found = named_leaves(abstract), stored.arrays
    return sorted(
        {
            leaf.dtype.name
            for name, leaf in wanted.items()
            if name.startswith("opt_state/")
            if name in found and found[name].dtype != leaf.dtype
        }
    )


def _abstract_stored(spec: StateSpec, stored: Checkpoint) -> Any:
    """Return the abstract state that a run saves, with the optional arrays that `stored` has."""
    return as_stored(spec.in_stored_order.abstract().to_save, stored.arrays)


def _model_keys(setup: Setup) -> dict[str, Any]:
    """Return the keys of `config.model`, as checkpoints record them."""
    return to_json_dict(setup.config)["model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a run compiles, once for a process.

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


def compile_programs(setup: Setup, state: TrainState) -> Programs:
    """Compile all programs before the first update: a stop signal then never waits for XLA."""
    config, mesh = setup.config, setup.mesh
    eval_batch = abstract_batch(config.data, mesh, batch_size=eval_batch_size(config))
    update = lower_update(config, mesh, setup.compute, setup.spec.optimizer, state)
    evaluate = eval_step(setup.compute, mesh).lower(state.whole, eval_batch)
    scores = None
    if setup.evaluated.tasks is not None:
        inputs = {name: array for name, array in eval_batch.items() if name != "loss_mask"}
        scores = token_scores(setup.compute, mesh).lower(state.whole, inputs)
    canary = None
    if config.guard.canary_every is not None:
        # Microbatches of the size that training has.
        parts = config.train.accumulation_steps * sharding.batch_shards(mesh)
        canary = Canary(
            state,
            mesh,
            setup.compute,
            rows=max(config.data.global_batch_size // parts, 1),
            seq_len=config.data.seq_len,
            options=resolve_compiler_options(config, setup.machine, mesh, deterministic=True),
        )
    compiled = setup.compiler_options.compile
    return Programs(
        digest=program_digest(update),
        update=compiled(update),
        evaluate=compiled(evaluate),
        score=None if scores is None else compiled(scores),
        canary=canary,
        weight_names=tuple(named_leaves(state.trained)),
    )
