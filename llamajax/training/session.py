"""What a run consists of before any memory is taken: its machine, mesh, data, optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llamajax import backends, data, optim, sharding
from llamajax.config import RunConfig, common_values
from llamajax.errors import UserError, combine
from llamajax.models.llama import Compute
from llamajax.models.pipeline import PipelineOptions
from llamajax.ops.attention import check_supported, first_supported
from llamajax.processes import process_facts as process_facts
from llamajax.training.state import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What a run consists of before any memory is taken."""

    config: RunConfig
    machine: backends.Machine
    mesh: Mesh
    compute: Compute
    optimizer: optax.GradientTransformation
    mixture: data.Mixture
    held_out: data.Mixture | None

    @property
    def data_record(self) -> dict[str, str]:
        """What is read, by split, as checkpoints record it."""
        splits = {"train": self.mixture, "validation": self.held_out}
        return {name: split.describe() for name, split in splits.items() if split is not None}

    @property
    def layout(self) -> Layout:
        """How the state is stored."""
        return layout_of(self.config)


def layout_of(config: RunConfig) -> Layout:
    """How the state of a run is stored."""
    guarded = config.guard.nonfinite != "off" or config.guard.spike_factor is not None
    return Layout(
        rounds=config.train.pipeline_rounds,
        offload=config.optim.offload,
        guard_window=config.guard.spike_window if guarded else None,
    )


def prepare(config: RunConfig) -> Session:
    """Start the machine and check everything against it. UserError for what a user can mend."""
    opened, refusal = (None, None), None
    try:
        opened = _open_data(config)
    except UserError as error:
        refusal = error  # raised below: the other processes must hear of it first
    machine = backends.start(
        config.backend, keep_programs=True, facts=lambda: _facts(config, *opened, refusal)
    )
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    check_mesh(config, mesh)
    if refusal is not None:
        raise refusal
    return Session(
        config=config,
        machine=machine,
        mesh=mesh,
        compute=how_to_compute(config, machine, mesh),
        optimizer=optim.build(config.optim, steps=config.train.steps),
        mixture=opened[0],
        held_out=opened[1],
    )


def _open_data(config: RunConfig) -> tuple[data.Mixture, data.Mixture | None]:
    """Open the train and the validation split; None where no path was prepared with the latter."""
    size = config.model.vocab_size
    mixture = data.open_mixture(config.data, split="train", vocab_size=size)
    if not data.has_split(config.data, "validation"):
        return mixture, None
    return mixture, data.open_mixture(config.data, split="validation", vocab_size=size)


def _facts(
    config: RunConfig,
    mixture: data.Mixture | None,
    held_out: data.Mixture | None,
    refusal: UserError | None,
) -> dict[str, str | None]:
    """Describe what all processes of a run must have in common."""
    facts = {**common_values(config), "problem": refusal and str(refusal)}
    for name, split in (("train", mixture), ("validation", held_out)):
        facts[f"the {name} data in data.path"] = split and split.describe()
    facts["the tokenizer in data.path"] = mixture and mixture.tokenizer_fingerprint[:12]
    return facts | process_facts.versions()


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raise one UserError with everything about the run that its mesh does not divide."""
    sharding.check_divides(
        config.model.dims,
        mesh,
        batch=config.data.global_batch_size,
        accumulation=config.train.accumulation_steps,
        seq_len=config.data.seq_len,
        microbatch_size=config.train.microbatch_size,
        rounds=config.train.pipeline_rounds,
    )


def how_to_compute(config: RunConfig, machine: backends.Machine, mesh: Mesh) -> Compute:
    """The computation that the config asks for; `auto` attention is resolved for the machine."""
    t = config.train
    facts = {
        "platform": machine.platform,
        "compute_capability": machine.compute_capability,
        "dtype": t.dtype,
        "head_size": config.model.head_size,
        "seq_len": config.data.seq_len,
        "sequence_parts": mesh.shape["sequence"],
    }
    impl = t.attention
    if impl == "auto":
        impl = first_supported(machine.attention_preferences, **facts)
    problems = check_supported(impl, **facts)
    if problems:
        raise combine(problems, title=f"train.attention = {impl!r} cannot run here:")
    return Compute(
        dtype=jnp.dtype(t.dtype),
        remat=t.remat,
        attention=impl,
        loss_chunk_tokens=t.loss_chunk_tokens,
        z_weight=t.z_loss,
        remat_keep=t.remat_keep,
        remat_offload=t.remat_offload,
        split_tokens=mesh.shape["tensor"] > 1,
        pipeline=PipelineOptions(
            microbatch_size=t.microbatch_size, rounds=t.pipeline_rounds, remat_stage=t.remat_stage
        ),
    )
