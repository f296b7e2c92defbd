"""What a checkpoint records of a run's tokenizer and data, and what changed since."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax import data, optim
from llamajax.checkpoint.weights import TOKENIZER
from llamajax.config import diff, from_json_dict
from llamajax.data.agreement import describe, is_recorded, tokenizer_record
from llamajax.errors import UserError
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
    if saved is None or is_recorded(ours, saved):
        return saved or tokenizer_record(ours)
    raise UserError(
        f"data.path: {path} was prepared with another tokenizer "
        f"({describe(tokenizer_record(ours))}) than the one that the checkpoints in --workdir were "
        f"trained with ({describe(saved)}): its token ids mean other text. Prepare the text again "
        f"with --tokenizer={kept}, or begin another --workdir"
    )


def data_record(session: Session) -> dict[str, list[dict[str, Any]]]:
    """Describe the data that a run reads: for each split, its sources with their weights."""
    splits = {"train": session.mixture, "validation": session.held_out}
    return {
        name: [
            {
                "path": str(source.path),
                "documents": source.stats["documents"],
                "tokens": source.num_tokens,
                "weight": weight,
                "fingerprint": source.fingerprint,
            }
            for source, weight in zip(split.sources, split.weights, strict=True)
        ]
        for name, split in splits.items()
        if split is not None
    }


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
    if "data" in meta:
        yield from _data_changes(meta["data"], data_record(session), step)
    elif meta["position"]["segments"][-1]["mixture_hash"] != session.mixture.hash:
        yield f"data changed since step {step}; the checkpoint does not say what it was"


def _data_changes(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> Iterator[str]:
    for split in {**now, **saved}:
        both = [record.get(split, ()) for record in (saved, now)]
        old, new = ([(s["fingerprint"], s["weight"]) for s in sources] for sources in both)
        if old != new:
            words = " -> ".join(" + ".join(map(_describe, s)) or "none" for s in both)
            yield f"data changed since step {step}: {split} split: {words}"


def _describe(source: Mapping[str, Any]) -> str:
    return (
        f"{source['path']} ({source['documents']:,} documents, {source['tokens']:,} tokens, weight "
        f"{source['weight']:.4g}, fingerprint {source['fingerprint'][:12]})"
    )
