"""Replay of one step of a run, twice, from the checkpoint before it, with all evidence about it.

Nothing is written into the run's directory. One process does it, on as many devices as the step
needs; a run of many processes is replayed on a mesh that one process has (`--mesh`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax import data
from llamajax.backends import compiler_flags
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint.directory_owner import recorded_directory
from llamajax.checkpoint.location import store_errors_explained
from llamajax.config.flags import mesh_config
from llamajax.data.batches import make_batch
from llamajax.errors import UserError, say
from llamajax.evaluation.scoring import token_scores
from llamajax.monitoring import Progress
from llamajax.replaying.document_losses import document_losses
from llamajax.replaying.evidence import Evidence, RecordComparison, same_number
from llamajax.replaying.replay_options import ReplayOptions
from llamajax.replaying.replay_record import ReplayRecord, read_record
from llamajax.replaying.step_probe import (
    IN_A_LAYER,
    gradient_probe,
    nonfinite_probe,
    nonfinite_weights,
)
from llamajax.training.feed import eval_batch_size, put_batch, train_batches
from llamajax.training.initial_state import initial_state, open_initial_weights
from llamajax.training.programs import lower_update
from llamajax.training.safety.rollback_log import RollbackLog
from llamajax.training.setup import Setup, set_up
from llamajax.training.state import TrainState


def replay(options: ReplayOptions) -> Evidence:
    """Find out all about the step. Raises UserError for what the user can fix."""
    workdir = Path(options.workdir)
    box = None if options.blackbox is None else Path(options.blackbox)
    with store_errors_explained(recorded_directory(workdir)):
        record = read_record(workdir, options.step, box=box)
    whole = set_up(_config(record, options))
    if whole.machine.num_processes > 1:
        raise UserError("replay runs in one process: start it on one node, with a mesh that it has")
    position = record.read_position(whole, RollbackLog(workdir, primary=False))
    base = record.base or "the beginning"
    say(f"replay   step {record.step}, from {base}: {record.step - record.first_step} steps")
    state, first_difference = _state_before(whole, record, position)
    setup = whole.at(record.step)
    state, config, mixture = setup.spec.retyped(state), setup.config, setup.mixture
    ids = data.sample_ids(mixture, position, record.step - 1)
    segment = position.segment(record.step - 1)
    samples = [mixture.locate(int(i), segment.seq_len, segment.packing) for i in ids]
    batch = make_batch(samples, config.data.seq_len, mask_documents=config.data.mask_documents)
    probe = gradient_probe(setup, state, put_batch(config.data, setup.mesh, batch))
    first, second = probe(), probe()
    first_nonfinite, losses = _forward(setup, state, batch)
    return Evidence(
        step=record.step,
        base=None if record.base is None else str(record.base),
        sample_ids=ids.tolist(),
        gradient=first,
        repeats=first.bits == second.bits
        and same_number(first.loss, second.loss)
        and same_number(first.grad_norm, second.grad_norm),
        record=RecordComparison(
            row=record.recorded_row(record.step, position),
            same_machine=_is_same_machine(record, setup),
            dtype=config.train.dtype,
            first_difference=first_difference,
        ),
        weights=nonfinite_weights(state),
        first_nonfinite=first_nonfinite,
        documents=None if losses is None else document_losses(ids.tolist(), samples, batch, losses),
        tokenizer=data.load_tokenizer(config.data.paths[0]),
    )


def _config(record: ReplayRecord, options: ReplayOptions) -> Any:
    """Return the run's config for one process, with the machine and mesh of the flags."""
    config, given = record.config, options.backend_config
    changed: dict[str, Any] = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    changed["deterministic"] = True  # the gradient is computed twice and compared
    if given.name is not None:
        changed |= {"name": given.name, "plugin": given.plugin, "options": given.options}
    if given.num_cpu_devices is not None:
        changed["num_cpu_devices"] = given.num_cpu_devices
    config = dataclasses.replace(
        config,
        backend=dataclasses.replace(config.backend, **changed),
        data=dataclasses.replace(config.data, validation=None),  # not read here
    )
    if options.mesh is None:
        return config
    return dataclasses.replace(config, mesh=mesh_config(options.mesh))


def _state_before(
    setup: Setup, record: ReplayRecord, position: data.Position
) -> tuple[TrainState, str | None]:
    """Return the state before the step, and the first step on the way that was not as recorded."""
    meta = None if record.base is None else record.base.meta
    first = setup.at(record.first_step)
    state = initial_state(first, record.base, open_initial_weights(setup.config, meta))
    start, first_difference = record.first_step, None
    if start + 1 == record.step:
        return state, None
    mixtures = setup.mixtures
    batches = train_batches(setup.config.data, setup.mesh, mixtures, position, step=start)
    update = None
    total = record.step - 1
    progress = Progress(total_steps=total, start_step=start, title="replay")
    for step in range(start + 1, record.step):
        if update is None or step - 1 in setup.borders:
            stage = setup.at(step)
            state = stage.spec.retyped(state)
            update = stage.compiler_options.compile(
                lower_update(stage.config, stage.mesh, stage.compute, stage.spec.optimizer, state)
            )
        state, metrics = update(state, next(batches))
        row = {name: metrics[name].item() for name in ("loss", "grad_norm")}
        progress.show({"step": step} | row)
        was = record.recorded_row(step, position)
        if first_difference is None and was and not all(same_number(was[n], row[n]) for n in row):
            first_difference = (
                f"step {step}: loss {was['loss']!r} is on record, {row['loss']!r} came out now"
            )
    progress.close()
    return state, first_difference


def _forward(
    setup: Setup, state: TrainState, batch: dict[str, np.ndarray]
) -> tuple[tuple[str, list[int]] | None, np.ndarray | None]:
    """Return the first activation that is not finite, with its rows, and the losses (B, T).

    One microbatch of the run at a time. Both are None on a mesh with stages or parts of sequences.
    """
    mesh = setup.mesh
    if mesh.shape["stage"] > 1 or mesh.shape["sequence"] > 1:
        return None, None
    c = setup.config
    model = setup.spec.to_stored_order(state).whole
    compute = dataclasses.replace(setup.compute, split_tokens=False, remat="none")
    probe, scores = nonfinite_probe(compute, mesh), token_scores(compute, mesh)
    size = eval_batch_size(c)
    probed, nll = [], []
    for start in range(0, c.data.global_batch_size, size):
        part = {name: array[start : start + size] for name, array in batch.items()}
        rows = put_batch(c.data, mesh, part)
        probed.append(jax.device_get(probe(model, rows)))
        del rows["loss_mask"]
        nll.append(jax.device_get(scores(model, rows).nll))
    layers_L6B, last_B = (np.concatenate(parts, axis=-1) for parts in zip(*probed, strict=True))
    nll_BT = np.where(batch["loss_mask"], np.concatenate(nll), 0)
    named = [("embedded tokens", layers_L6B[0, 0])]
    for layer, counts_6B in enumerate(layers_L6B):
        inside = list(zip(IN_A_LAYER, counts_6B, strict=True))[1:]  # the input is known already
        named += [(f"layer {layer}: {name}", counts) for name, counts in inside]
    named += [("last hidden states", last_B), ("token losses", ~np.isfinite(nll_BT).all(axis=1))]
    found = next(((name, np.flatnonzero(odd).tolist()) for name, odd in named if odd.any()), None)
    return found, nll_BT


def _is_same_machine(record: ReplayRecord, setup: Setup) -> bool:
    """Return whether bits must be the same: platform, kind of device, mesh, JAX, options are."""
    was, now = record.machine, setup.machine
    environment = was.get("profile", {}).get("environment", {})
    if (
        not record.config.backend.deterministic
        and platform_facts(now.platform).deterministic_options
    ):
        return False
    versions = {name: was.get("versions", {}).get(name) for name in ("jax", "jaxlib")}
    return (
        was.get("platform") == now.platform
        and was.get("device_kind") == now.device_kind
        and was.get("mesh") == dict(setup.mesh.shape)
        and was.get("num_processes") == 1
        and versions == {name: now.versions.get(name) for name in versions}
        and was.get("compiler_options", {}) == setup.compiler_options.values
        and compiler_flags(environment) == compiler_flags()
    )
