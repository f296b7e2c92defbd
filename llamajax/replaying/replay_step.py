"""One step of a run done again: from the checkpoint before it, twice, and looked into.

Nothing is written into the run's directory. One process does it, on as many devices as the step
needs; a run of many processes is replayed on a mesh that one has (`--mesh`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax import data, sharding
from llamajax.config.flags import mesh_config
from llamajax.config.schema import BackendConfig
from llamajax.data.batches import make_batch
from llamajax.errors import UserError, say
from llamajax.evaluation.scoring import token_losses
from llamajax.monitoring import Progress
from llamajax.monitoring.row_comparison import TOLERANCES
from llamajax.replaying.documents import Piece, largest
from llamajax.replaying.explanation import Evidence
from llamajax.replaying.replay_record import ReplayRecord, read_record
from llamajax.replaying.step_probe import (
    IN_A_LAYER,
    can_probe_layers,
    gradient_probe,
    nonfinite_probe,
    nonfinite_weights,
)
from llamajax.training.feed import Feed
from llamajax.training.origin import open_origin
from llamajax.training.safety.audit import Audit
from llamajax.training.session import Session, prepare
from llamajax.training.starting import starting_state, update_of
from llamajax.training.state import TrainState, to_natural


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What the verb is asked. mesh: as `--mesh` has it, None: the run's own."""

    workdir: Path
    step: int
    box: Path | None
    mesh: str | None
    backend: BackendConfig


def replay(request: ReplayOptions) -> Evidence:
    """All that is found about the step. Raises UserError for what the user can mend."""
    record = read_record(request.workdir, request.step, box=request.box)
    session = prepare(_config(record, request))
    if session.machine.num_processes > 1:
        raise UserError("replay runs in one process: start it on one node, with a mesh that it has")
    audit = Audit(request.workdir, primary=False)
    position = record.place(session.mixture, audit)
    base = record.base or "the beginning"
    say(f"replay   step {record.step}, from {base}: {record.step - record.first_step} steps")
    state, apart = _before(session, record, position)
    ids = data.sample_ids(session.mixture, position, record.step - 1)
    batch = _batch(session, ids)
    place = lambda rows: sharding.put_batch(_wanted(session, batch, rows), session.mesh)  # noqa: E731
    whole = range(session.config.data.global_batch_size)
    probe = gradient_probe(session, state, place(whole))
    first, second = probe(), probe()
    first_odd, pieces, median = _forward(session, state, batch, ids)
    return Evidence(
        step=record.step,
        base=None if record.base is None else str(record.base),
        sample_ids=ids.tolist(),
        first=first,
        second=second,
        recorded=record.recorded(record.step, position),
        same_machine=_is_same_machine(record, session),
        tolerance=TOLERANCES[session.config.train.dtype],
        earlier=apart,
        weights=nonfinite_weights(state),
        first_nonfinite=first_odd,
        pieces=pieces,
        median=median,
        tokenizer=_tokenizer(session),
        dtype=session.config.train.dtype,
    )


def _config(record: ReplayRecord, request: ReplayOptions) -> Any:
    """The run's config, for one process, on the machine and mesh that were asked for."""
    c, given = record.config, request.backend
    backend = dataclasses.replace(
        c.backend, coordinator_address=None, num_processes=None, process_id=None
    )
    if given.name is not None:
        backend = dataclasses.replace(
            backend, name=given.name, plugin=given.plugin, options=given.options
        )
    if given.num_cpu_devices is not None:
        backend = dataclasses.replace(backend, num_cpu_devices=given.num_cpu_devices)
    changed: dict[str, Any] = {"backend": backend}
    if request.mesh is not None:
        changed["mesh"] = mesh_config(request.mesh, rest="fsdp")
    return dataclasses.replace(c, **changed)


def _before(
    session: Session, record: ReplayRecord, position: data.Position
) -> tuple[TrainState, str | None]:
    """The state before the step, and the first step on the way that was not as recorded."""
    meta = None if record.base is None else record.base.meta
    state = starting_state(session, record.base, open_origin(session.config, meta))
    start, apart = record.first_step, None
    if start + 1 == record.step:
        return state, None
    feed = Feed(
        session.config, session.mesh, mixture=session.mixture, held_out=None, position=position
    )
    batches, update = feed.train(start), update_of(session)
    update = update.lower(state, feed.abstract(session.config.data.global_batch_size)).compile()
    total = record.step - 1
    progress = Progress(total_steps=total, start_step=start, mode="auto", primary=True)
    for step in range(start + 1, record.step):
        state, metrics = update(state, next(batches))
        row = {name: metrics[name].item() for name in ("loss", "grad_norm")}
        progress.show({"step": step} | row)
        was = record.recorded(step, position)
        if apart is None and was and not _equal(was, row):
            apart = f"step {step}: loss {was['loss']!r} is on record, {row['loss']!r} came out now"
    progress.close()
    return state, apart


def _equal(was: Any, row: Any) -> bool:
    pairs = [(was[name], row[name]) for name in ("loss", "grad_norm")]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _batch(session: Session, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The whole global batch of these samples, on the host."""
    seq_len = session.config.data.seq_len
    samples = [session.mixture.locate(int(i), seq_len) for i in ids]
    return make_batch(samples, seq_len, mask_documents=session.config.data.mask_documents)


def _wanted(session: Session, batch: dict, rows: range) -> dict[str, np.ndarray]:
    drop = () if session.config.data.mask_documents else ("segment_ids",)
    part = slice(rows.start, rows.stop)
    return {name: array[part] for name, array in batch.items() if name not in drop}


def _forward(
    session: Session, state: TrainState, batch: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[tuple[str, list[int]] | None, list[Piece] | None, float]:
    """The first activation that is not finite, with its rows; the documents by their loss, and
    its median over all of them.

    A microbatch at a time. Neither on a mesh with stages or parts of sequences.
    """
    if not can_probe_layers(session.mesh):
        return None, None, 0.0
    c = session.config
    natural = to_natural(state, c.model, session.mesh, layout=session.layout)
    compute = dataclasses.replace(session.compute, split_tokens=False, remat="none")
    walk, losses = nonfinite_probe(compute, session.mesh), token_losses(compute, session.mesh)
    size = c.data.global_batch_size // c.train.accumulation_steps
    walked, nll = [], []
    for start in range(0, c.data.global_batch_size, size):
        rows = sharding.put_batch(_wanted(session, batch, range(start, start + size)), session.mesh)
        walked.append(jax.device_get(walk(natural.whole, rows)))
        del rows["loss_mask"]
        nll.append(jax.device_get(losses(natural.whole, rows)))
    layers, last = (np.concatenate(parts, axis=-1) for parts in zip(*walked, strict=True))
    nll_BT = np.where(batch["loss_mask"], np.concatenate(nll), 0)
    named = [("embedded tokens", layers[0, 0])]
    for layer, odd_6B in enumerate(layers):
        named += [(f"layer {layer}: {n}", r) for n, r in zip(IN_A_LAYER, odd_6B, strict=True)][1:]
    named += [("last hidden states", last), ("token losses", ~np.isfinite(nll_BT).all(axis=1))]
    found = next(((name, np.flatnonzero(odd).tolist()) for name, odd in named if odd.any()), None)
    return found, *largest(session.mixture, ids, batch, nll_BT)


def _is_same_machine(record: ReplayRecord, session: Session) -> bool:
    """Whether bits should be the same: platform, kind of device, mesh, JAX."""
    was, now = record.machine, session.machine
    versions = {name: was.get("versions", {}).get(name) for name in ("jax", "jaxlib")}
    return (
        was.get("platform") == now.platform
        and was.get("device_kind") == now.device_kind
        and was.get("mesh") == dict(session.mesh.shape)
        and was.get("num_processes") == 1
        and versions == {name: now.versions.get(name) for name in versions}
    )


def _tokenizer(session: Session) -> data.Tokenizer:
    return data.load_tokenizer(session.config.data.path.split(",")[0].strip())
