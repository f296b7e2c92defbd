"""Where the weights of a run come from: `train.init_from`, checked against the run that asks.

A run imports once. Afterwards its own checkpoints hold everything, but for the frozen weights of a
run with adapters: those are read again from where they were, and must be the same ones.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax import data
from llamajax.checkpoint.location import locate
from llamajax.checkpoint.restore import model_differences
from llamajax.config import from_json_dict
from llamajax.config.schema import LoraConfig, RunConfig
from llamajax.config.values import show
from llamajax.errors import UserError, combine
from llamajax.formats.weights import Weights, open_base, open_weights
from llamajax.tokenizers.tokenizer_identity import data_mismatch, load_recorded

# What must not change in a run with adapters: the function, or the arrays of its checkpoints.
_FIXED = ("rank", "alpha", "targets", "base_dtype")


def open_origin(config: RunConfig, meta: Mapping[str, Any] | None) -> Weights | None:
    """The weights to import before the first or next step; None where there are none to import.

    meta: of the checkpoint that the run continues from, if it does. Raises one UserError with
    everything that does not fit: architecture, tokenizer, the base of earlier adapters.
    """
    if meta is None:
        if config.train.init_from is None:
            return None
        try:
            weights = open_weights(config.train.init_from)
        except UserError as error:
            raise UserError(f"train.init_from = {config.train.init_from}: {error}") from None
        return _checked(weights, config)
    before = from_json_dict(meta["config"], source="the config of the newest checkpoint")
    _check_adapters(before.lora, config.lora)
    if not config.lora.rank:
        return None
    moved = before.train.init_from != config.train.init_from
    path = locate(config.train.init_from) if moved else None
    return open_base(meta["base"], path=path, adapters=Path("this --workdir"))


def base_record(origin: Weights) -> dict[str, str]:
    """What checkpoints of adapters say of the weights that they belong to."""
    return {"path": str(origin.path), "fingerprint": origin.fingerprint()}


def _checked(weights: Weights, config: RunConfig) -> Weights:
    problems = model_differences(*map(dataclasses.asdict, (weights.model, config.model)))
    if weights.tokenizer is not None:
        problems += _token_differences(weights, config)
    if problems:
        raise combine(
            problems, title=f"train.init_from = {config.train.init_from}: its weights do not fit:"
        )
    return weights


def _token_differences(weights: Weights, config: RunConfig) -> list[str]:
    path, tokenizer = config.data.path.split(",")[0].strip(), weights.tokenizer
    ours = data.load_tokenizer(path)
    theirs = load_recorded(tokenizer, weights.tokenizer_record, of=weights.path)
    problem = data_mismatch(f"data.path: {path}", ours, theirs, tokenizer)
    return [problem] if problem else []


def _check_adapters(old: LoraConfig, new: LoraConfig) -> None:
    """Raise UserError when the run that continues has other adapters than the one that it was."""
    keys = _FIXED if old.rank and new.rank else ("rank",)
    pairs = {key: (show(getattr(old, key)), show(getattr(new, key))) for key in keys}
    problems = [f"lora.{k}: it was {a}, now it is {b}" for k, (a, b) in pairs.items() if a != b]
    if problems:
        raise combine(
            problems,
            title="the checkpoints in --workdir are of other adapters; choose another --workdir, "
            "or go back to what it was:",
        )
