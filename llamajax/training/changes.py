"""What a checkpoint records of a run's tokenizer and data, and what changed since."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax import data, optim
from llamajax.config import diff, from_json_dict
from llamajax.errors import UserError
from llamajax.formats.weights import TOKENIZER
from llamajax.tokenizers.tokenizer_identity import describe, matches_record, tokenizer_record
from llamajax.training.session import Session


def run_tokenizer(session: Session, meta: Mapping[str, Any] | None, workdir: Path) -> dict:
    """Return the record of the run's tokenizer; UserError where the data has another one.

    meta: of the checkpoint that the run continues from, if it does.
    """
    saved, kept = (meta or {}).get("tokenizer"), workdir / TOKENIZER
    if meta is not None and saved is None and kept.is_dir():
        saved = tokenizer_record(data.load_tokenizer(kept))  # older checkpoints have no record
    if saved and saved["fingerprint"] == session.mixture.tokenizer_fingerprint:
        return saved
    path = session.mixture.sources[0].path
    ours = data.load_tokenizer(path)
    if saved is None or matches_record(ours, saved):
        return saved or tokenizer_record(ours)
    raise UserError(
        f"data.path: {path} was prepared with another tokenizer "
        f"({describe(tokenizer_record(ours))}) than the one that the checkpoints in --workdir were "
        f"trained with ({describe(saved)}): its token ids mean other text. Prepare the text again "
        f"with --tokenizer={kept}, or begin another --workdir"
    )


def changes(session: Session, meta: Mapping[str, Any], step: int) -> Iterator[str]:
    """Yield a line for all that changed since the checkpoint of `step` was saved."""
    before, now = from_json_dict(meta["config"]), session.config
    keys = diff(before, now)
    for key, (old, new) in keys.items():
        yield f"changed since step {step}: {key}: {old} -> {new}"
    if keys and step < now.train.steps:
        rates = [
            float(optim.schedule(c.optim, steps=c.train.steps)(step + 1)) for c in (before, now)
        ]
        if not math.isclose(*rates, rel_tol=1e-5):
            old, new = (f"{rate:.6g}" for rate in rates)
            yield f"changed since step {step}: learning rate of step {step + 1}: {old} -> {new}"
    if "data" not in meta:
        if meta["position"]["segments"][-1]["mixture_hash"] != session.mixture.hash:
            yield f"data changed since step {step}; the checkpoint does not say what it was"
        return
    for split in ("train", "validation"):
        old, new = (record.get(split, "none") for record in (meta["data"], session.data_record))
        if old != new:
            where = f"{split} split of {now.data.path}"
            yield f"data changed since step {step}: {where}: {old} -> {new}"
