"""One run of one config in one directory: restored or begun, compiled, carried to its end.

The order is that of the errors a user can make: the machine, the mesh and the data first, then the
weights and the checkpoint, and only then memory and compilation.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llamajax import data
from llamajax.checkpoint import Checkpointer, CheckpointError
from llamajax.checkpoint.weights import Weights
from llamajax.config import RunConfig, diff, from_json_dict, to_json_dict
from llamajax.errors import UserError
from llamajax.models.abstract import abstract_model
from llamajax.monitoring import MetricsWriter, Progress, StepTimer, load_metrics, write_run_facts
from llamajax.training.agreement import decided_by_primary
from llamajax.training.departure import LeavingAtOnce
from llamajax.training.export import exporter, is_exported, write_adapters
from llamajax.training.feed import Feed
from llamajax.training.loop import Loop
from llamajax.training.narration import conclude, facts, greet, previous, rates
from llamajax.training.origin import base_record, open_origin
from llamajax.training.session import Session, prepare
from llamajax.training.shutdown import EXIT_CODE, Shutdown
from llamajax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    state_around,
    to_natural,
    to_pipeline,
)
from llamajax.training.step import eval_step, train_step
from llamajax.training.workdir import (
    check_shared,
    keep_tokenizer,
    opened,
    say,
    write_config,
)


def train(config: RunConfig, *, workdir: Path, shutdown: Shutdown) -> int:
    """Run to the end or to a signal; the exit code. Continues from the newest checkpoint."""
    with LeavingAtOnce():
        session = prepare(config)
    if session.machine.num_processes > 1:
        shutdown.take_back()
    with LeavingAtOnce(), contextlib.ExitStack() as stack:
        stack.enter_context(opened(workdir, process_id=session.machine.process_id))
        check_shared(workdir)
        checkpointer = stack.enter_context(_checkpointer(session, workdir))
        stack.enter_context(LeavingAtOnce())  # before the checkpointer waits for the others
        shutdown.name_previous(lambda: previous(checkpointer))
        start = _where_to_start(session, checkpointer)
        if session.machine.is_primary:
            write_config(workdir, config)
            keep_tokenizer(workdir, config)
        greet(session, start.step)
        loop, state = _build(session, checkpointer, start, workdir, shutdown, stack)
        try:
            code = _run(loop, state, start.step, workdir)
            if code == 0 and config.lora.rank:
                write_adapters(config, start.base, workdir)
        except CheckpointError as error:
            say(f"error: {error}. Make room or mend the directory; a rerun continues from the last")
            code = 2
    if session.machine.is_primary:
        conclude(session, loop, workdir, code)
    return code


def _run(loop: Loop, state: TrainState, start: int, workdir: Path) -> int:
    if start and loop.eval_is_due(start) and not _told(_is_evaluated, workdir, start):
        loop.evaluate(start, state)  # a signal or a crash came between the save and this
    if start and loop.export_is_due(start) and not _told(is_exported, workdir, start):
        loop.export(start, loop.at_rest(state))
    step = loop.run(state, start)
    return 0 if step == loop.train.steps and not loop.shutdown.requested else EXIT_CODE


def _told(question: Callable[[Path, int], bool], workdir: Path, step: int) -> bool:
    """Process 0's answer: all must do the same, whatever their file systems show them."""
    return bool(decided_by_primary(lambda: int(question(workdir, step))))


def _is_evaluated(workdir: Path, step: int) -> bool:
    return any(row["step"] == step and "eval_loss" in row for row in load_metrics(workdir))


def _checkpointer(session: Session, workdir: Path) -> Checkpointer:
    c = session.config.checkpoint
    return Checkpointer(
        workdir / "checkpoints",
        keep=c.keep,
        keep_every=c.keep_every,
        asynchronous=c.asynchronous and session.machine.saves_asynchronously,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a run takes up.

    step: updates already applied; position: where in the data they ended. origin: weights to
    import. base: of a run with adapters, what its checkpoints say of the frozen weights.
    """

    step: int
    position: data.Position
    origin: Weights | None
    base: dict[str, str] | None
    ledger: data.Ledger


def _where_to_start(session: Session, checkpointer: Checkpointer) -> _Start:
    """Says what changed since the newest whole checkpoint. UserError where weights do not fit."""
    config, mixture = session.config, session.mixture
    now = {
        "batch_size": config.data.global_batch_size,
        "seq_len": config.data.seq_len,
        "mixture_hash": mixture.hash,
    }
    start, words = checkpointer.newest_whole()
    for line in words:
        say(line, primary=session.machine.is_primary)
    meta = None if start is None else checkpointer.read_meta(start)
    origin = open_origin(config, meta)
    base = base_record(origin) if config.lora.rank else None
    if meta is None:
        position = data.Position.start(**now)
        ledger = data.Ledger(mixture, position, step=0, saved=None)
        return _Start(step=0, position=position, origin=origin, base=base, ledger=ledger)
    if start > config.train.steps:
        raise UserError(
            f"the newest checkpoint is of step {start}, beyond train.steps = {config.train.steps}: "
            "raise train.steps, or choose another --workdir"
        )
    for change in diff(from_json_dict(meta["config"]), config):
        say(f"changed since step {start}: {change}", primary=session.machine.is_primary)
    before, saved = data.Position.from_json(meta["position"]), meta.get("ledger")
    if saved and start:
        data.check_ledger(saved, mixture, before, step=start)
    position = before.continued(step=start, **now)
    ledger = data.Ledger(mixture, position, step=start, saved=saved)
    return _Start(step=start, position=position, origin=origin, base=base, ledger=ledger)


def _build(
    session: Session,
    checkpointer: Checkpointer,
    start: _Start,
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
        position=start.position,
    )
    with timer.pause("restore" if start.step else "import" if start.origin else "init"):
        state = _state(session, checkpointer, start)
    with timer.pause("compile"):
        steps = _compiled(session, feed, state)
    say(f"ready    compiled in {timer.breakdown()['compile_s']:.1f} s", primary=primary)
    metrics = MetricsWriter(
        workdir, tensorboard=config.monitoring.tensorboard, resume_step=start.step, primary=primary
    )
    progress = Progress(
        total_steps=config.train.steps,
        start_step=start.step,
        mode=config.monitoring.progress,
        primary=primary,
    )
    stack.callback(metrics.close)
    stack.callback(progress.close)
    if primary:
        write_run_facts(workdir, facts(session, steps[0]))
    batches = feed.train(start.step)
    return Loop(
        train=config.train,
        checkpoint=config.checkpoint,
        step=steps[0],
        eval_step=steps[1],
        train_batches=batches,
        eval_batches=feed.evaluation,
        rates=rates(session),
        tokens_seen=start.position.tokens_seen,
        meta=lambda step: _meta(config, start),
        at_rest=functools.partial(
            to_natural, config=config.model, mesh=session.mesh, layout=session.layout
        ),
        export=exporter(config, workdir, progress),
        checkpointer=checkpointer,
        metrics=metrics,
        progress=progress,
        timer=timer,
        shutdown=shutdown,
        saw=start.ledger.add,
    ), state


def _meta(config: RunConfig, start: _Start) -> dict[str, Any]:
    """What is saved with every checkpoint, besides the arrays."""
    meta = {"config": to_json_dict(config), "position": start.position.to_json()}
    meta["ledger"] = start.ledger.to_json()
    return meta | ({"base": start.base} if start.base else {})


def _state(session: Session, checkpointer: Checkpointer, start: _Start) -> TrainState:
    """The state to continue with: random, imported, restored, or adapters on imported weights."""
    config, where = session.config, (session.optimizer, session.mesh)
    lora, layout = config.lora if config.lora.rank else None, session.layout
    model = None
    if start.origin is not None:
        dtype = jnp.dtype(lora.base_dtype if lora else "float32")
        model = start.origin.load(abstract_model(config.model, session.mesh, dtype=dtype))
    if start.step:
        abstract = abstract_state(config.model, *where, lora=lora, layout=layout.at_rest).to_save
        saved = checkpointer.restore(abstract, start.step, model=to_json_dict(config)["model"])[0]
        state = saved if model is None else saved.replace(model=model)
    elif model is None:
        return init_state(config.model, *where, seed=config.train.seed, layout=layout)
    else:
        state = state_around(model, *where, lora=lora, seed=config.train.seed, layout=layout)
    return to_pipeline(state, config.model, session.mesh, layout=layout)


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
    return update.lower(state, batch).compile(), evaluate.lower(state.whole, held_out).compile()
