"""One run of one config in one directory: everything that is checked, built, restored, compiled.

The order is that of the errors a user can make: the machine, the mesh and the data first, then the
checkpoint, and only then memory and compilation.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llamajax import backends, data, optim, sharding
from llamajax.checkpoint import Checkpointer, CheckpointError
from llamajax.config import RunConfig, diff, from_json_dict, to_json_dict
from llamajax.errors import UserError, combine
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.llama import Compute
from llamajax.monitoring import (
    MetricsWriter,
    Progress,
    StepTimer,
    load_metrics,
    write_report,
    write_run_facts,
)
from llamajax.monitoring.progress import format_count
from llamajax.ops.attention import check_supported, first_supported
from llamajax.training.feed import Feed
from llamajax.training.loop import Loop
from llamajax.training.shutdown import EXIT_CODE, Shutdown
from llamajax.training.state import TrainState, abstract_state, init_state
from llamajax.training.step import eval_step, train_step
from llamajax.training.workdir import opened, say, write_config


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


def prepare(config: RunConfig) -> Session:
    """Start the machine and check everything against it. UserError for what a user can mend."""
    machine = backends.start(config.backend)
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    batch, accumulation = config.data.global_batch_size, config.train.accumulation_steps
    sharding.check_divides(config.model.dims, mesh, batch=batch, accumulation=accumulation)
    vocab_size = config.model.vocab_size
    return Session(
        config=config,
        machine=machine,
        mesh=mesh,
        compute=how_to_compute(config, machine),
        optimizer=optim.build(config.optim, steps=config.train.steps),
        mixture=data.open_mixture(config.data, split="train", vocab_size=vocab_size),
        held_out=_held_out(config),
    )


def _held_out(config: RunConfig) -> data.Mixture | None:
    """The validation split; None where none of the paths was prepared with one."""
    if not data.has_split(config.data, "validation"):
        return None
    return data.open_mixture(config.data, split="validation", vocab_size=config.model.vocab_size)


def how_to_compute(config: RunConfig, machine: backends.Machine) -> Compute:
    """The computation that the config asks for; `auto` attention is resolved for the machine."""
    facts = {
        "platform": machine.platform,
        "compute_capability": machine.compute_capability,
        "dtype": config.train.dtype,
        "head_size": config.model.head_size,
        "seq_len": config.data.seq_len,
    }
    impl = config.train.attention
    if impl == "auto":
        impl = first_supported(backends.attention_preferences(machine.platform), **facts)
    problems = check_supported(impl, **facts)
    if problems:
        raise combine(problems, title=f"train.attention = {impl!r} cannot run here:")
    return Compute(
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        attention=impl,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        z_weight=config.train.z_loss,
    )


def train(config: RunConfig, *, workdir: Path, shutdown: Shutdown) -> int:
    """Run to the end or to a signal; the exit code. Continues from the newest checkpoint."""
    session = prepare(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(opened(workdir, process_id=session.machine.process_id))
        checkpointer = stack.enter_context(_checkpointer(config, workdir))
        shutdown.name_previous(lambda: _previous(checkpointer))
        start, position = _where_to_start(session, checkpointer)
        write_config(workdir, config) if session.machine.is_primary else None
        _greet(session, start)
        loop, state = _build(session, checkpointer, position, start, workdir, shutdown, stack)
        try:
            code = _run(loop, state, start, workdir)
        except CheckpointError as error:
            say(f"error: {error}. Make room or mend the directory; a rerun continues from the last")
            code = 2
    if session.machine.is_primary:
        _conclude(session, loop, workdir, code)
    return code


def _run(loop: Loop, state: TrainState, start: int, workdir: Path) -> int:
    if start and loop.eval_is_due(start) and not _is_evaluated(workdir, start):
        loop.evaluate(start, state)  # a signal or a crash came between the save and this
    step = loop.run(state, start)
    return 0 if step == loop.train.steps and not loop.shutdown.requested else EXIT_CODE


def _is_evaluated(workdir: Path, step: int) -> bool:
    return any(row["step"] == step and "eval_loss" in row for row in load_metrics(workdir))


def _checkpointer(config: RunConfig, workdir: Path) -> Checkpointer:
    c = config.checkpoint
    return Checkpointer(
        workdir / "checkpoints",
        keep=c.keep,
        keep_every=c.keep_every,
        asynchronous=c.asynchronous,
    )


def _previous(checkpointer: Checkpointer) -> str:
    steps = checkpointer.steps()
    return f"{checkpointer.directory / str(steps[-1])}" if steps else "none yet, it starts anew"


def _where_to_start(session: Session, checkpointer: Checkpointer) -> tuple[int, data.Position]:
    """Updates already applied, and where in the data they ended. Prints what changed since."""
    config, mixture = session.config, session.mixture
    now = {
        "batch_size": config.data.global_batch_size,
        "seq_len": config.data.seq_len,
        "mixture_hash": mixture.hash,
    }
    start = checkpointer.latest()
    if start is None:
        return 0, data.Position.start(**now)
    meta = checkpointer.read_meta(start)
    if start > config.train.steps:
        raise UserError(
            f"the newest checkpoint is of step {start}, beyond train.steps = {config.train.steps}: "
            "raise train.steps, or choose another --workdir"
        )
    for change in diff(from_json_dict(meta["config"]), config):
        say(f"changed since step {start}: {change}", primary=session.machine.is_primary)
    position = data.Position.from_json(meta["position"])
    return start, position.continued(step=start, **now)


def _greet(session: Session, start: int) -> None:
    """Say once what runs where, and from which step."""
    c, m = session.config, session.machine
    tokens = c.data.global_batch_size * c.data.seq_len
    peak = backends.peak_flops(m.device_kind, c.train.dtype)
    if session.held_out is None:
        say("warning: the data has no validation split: no evaluation", primary=m.is_primary)
    for line in (
        f"model    {c.model.name or 'custom'}, {format_count(num_parameters(c.model))} parameters",
        f"machine  {m.platform}, {m.device_kind}; mesh {sharding.describe(session.mesh)}",
        f"compute  {c.train.dtype}, attention {session.compute.attention}, remat {c.train.remat}",
        f"peak     {peak[0] / 1e12:.0f} TFLOP/s a device ({peak[1]})"
        if peak
        else f"peak     unknown for {m.device_kind!r}: no MFU",
        f"data     {c.data.path}; {c.data.global_batch_size} x {c.data.seq_len} = "
        f"{format_count(tokens)} tokens a step",
        f"steps    {c.train.steps}, continuing from step {start}"
        if start
        else f"steps    {c.train.steps}, from the beginning",
    ):
        say(line, primary=m.is_primary)


def _build(
    session: Session,
    checkpointer: Checkpointer,
    position: data.Position,
    start: int,
    workdir: Path,
    shutdown: Shutdown,
    stack: contextlib.ExitStack,
) -> tuple[Loop, TrainState]:
    """Memory and compilation: the state, the two steps, and the loop around them."""
    config, primary = session.config, session.machine.is_primary
    tokens = config.data.global_batch_size * config.data.seq_len
    timer = StepTimer(tokens_per_step=tokens)
    feed = Feed(
        config,
        session.mesh,
        mixture=session.mixture,
        held_out=session.held_out,
        position=position,
    )
    with timer.pause("restore" if start else "init"):
        state = _state(session, checkpointer, start)
    with timer.pause("compile"):
        steps = _compiled(session, feed, state)
    say(f"ready    compiled in {timer.breakdown()['compile_s']:.1f} s", primary=primary)
    metrics = MetricsWriter(
        workdir, tensorboard=config.monitoring.tensorboard, resume_step=start, primary=primary
    )
    progress = Progress(
        total_steps=config.train.steps,
        start_step=start,
        mode=config.monitoring.progress,
        primary=primary,
    )
    stack.callback(metrics.close)
    stack.callback(progress.close)
    if primary:
        write_run_facts(workdir, _facts(session))
    batches = feed.train(start)
    return Loop(
        train=config.train,
        checkpoint=config.checkpoint,
        step=steps[0],
        eval_step=steps[1],
        train_batches=batches,
        eval_batches=feed.evaluation,
        rates=_rates(session),
        tokens_seen=position.tokens_seen,
        meta=lambda step: {"config": to_json_dict(config), "position": position.to_json()},
        checkpointer=checkpointer,
        metrics=metrics,
        progress=progress,
        timer=timer,
        shutdown=shutdown,
    ), state


def _state(session: Session, checkpointer: Checkpointer, start: int) -> TrainState:
    config, seed = session.config, session.config.train.seed
    if not start:
        return init_state(config.model, session.optimizer, session.mesh, seed=seed)
    abstract = abstract_state(config.model, session.optimizer, session.mesh)
    model = to_json_dict(config)["model"]
    return checkpointer.restore(abstract, start, model=model)[0]


def _compiled(session: Session, feed: Feed, state: TrainState) -> tuple[Callable, Callable]:
    """Both steps, compiled before the first update, so that no signal meets a compiler later."""
    config = session.config
    update = train_step(
        session.optimizer, config.optim, config.train, session.compute, session.mesh
    )
    evaluate = eval_step(session.compute, session.mesh)
    batch, held_out = (
        feed.abstract(n) for n in (config.data.global_batch_size, feed.eval_batch_size)
    )
    return update.lower(state, batch).compile(), evaluate.lower(state.model, held_out).compile()


def _rates(session: Session) -> Callable[[float], dict[str, float | None]]:
    """Both MFUs as fractions from tokens/s; null where the peak of the device is not known."""
    config, machine = session.config, session.machine
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)

    def rates(tokens_per_s: float) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, causal in (("mfu_full", False), ("mfu_causal", True)):
            flops = flops_per_token(config.model, config.data.seq_len, causal=causal)
            total = peak and peak[0] * machine.num_devices
            found[name] = total and tokens_per_s * flops / total
        return found

    return rates


def _facts(session: Session) -> dict[str, Any]:
    """What `run.json` says of a run that has begun."""
    machine = session.machine
    peak = backends.peak_flops(machine.device_kind, session.config.train.dtype)
    facts = dataclasses.asdict(machine)
    del facts["process_id"]
    return facts | {
        "status": "running",
        "mesh": dict(session.mesh.shape),
        "attention": session.compute.attention,
        "num_parameters": num_parameters(session.config.model),
        "peak_flops": peak[0] if peak else None,
        "peak_source": peak[1] if peak else None,
        "unigram_entropy": session.held_out.unigram_loss if session.held_out else None,
    }


def _conclude(session: Session, loop: Loop, workdir: Path, code: int) -> None:
    """Write the last facts and the report; say where things are."""
    facts = {
        "status": "finished" if code == 0 else "stopped",
        "time_breakdown": loop.timer.breakdown(),
        "tokens_per_s": loop.timer.mean_tokens_per_s,
        "peak_memory_bytes": backends.peak_memory_bytes(),
    }
    try:
        write_run_facts(workdir, facts)
        write_report(workdir)
    except OSError as error:
        say(f"warning: no report was written: {error.strerror}")
        return
    word = "finished" if code == 0 else "stopped; rerun the same command to continue"
    say(f"{word}. Checkpoint {_previous(loop.checkpointer)}, report {workdir / 'report.html'}")
