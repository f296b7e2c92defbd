"""Recognize a directory of Meta's, and complete the architecture in its `params.json`.

The sizes of the feed-forward layer and of the vocabulary are those of the tensors. Whether the head
is tied, how the rotary embedding is scaled and how long a sequence may be follow the rules below,
and the user is told.
"""

import re
from pathlib import Path
from typing import Any

from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError, combine
from llamajax.files import read_json_object
from llamajax.formats.foreign_weights import ForeignWeights, imported_model, note, same_matrix
from llamajax.formats.meta.meta_source import EMBEDDING, HEAD, MetaSource

PARAMS = "params.json"
_LLAMA2_THETA = 10_000.0  # params.json of Llama 2 has none
_GATE, _QUERY = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
_FACTORS = ("rope_scaling_factor", "rope_scale_factor", "rope_scale")


def recognize(path: Path) -> ForeignWeights | None:
    """Open a directory of Meta's consolidated files; return None for anything else.

    Raises UserError for missing, damaged or unsafe files, and for another architecture.
    """
    if not path.is_dir() or not (path / PARAMS).is_file() or not (files := _files(path)):
        return None
    params = _read_params(path / PARAMS)
    source = MetaSource(
        files,
        hidden_size=params["dim"],
        num_heads=params["n_heads"],
        num_kv_heads=params["n_kv_heads"],
    )
    model = _model_config(path / PARAMS, params, source)
    # The download of Llama 2 keeps the tokenizer of all sizes one level up.
    candidates = (path / "tokenizer.model", path.parent / "tokenizer.model")
    tokenizer = next((file for file in candidates if file.is_file()), None)
    return ForeignWeights(model=model, tokenizer=tokenizer, source=source)


def _files(path: Path) -> list[Path]:
    """List consolidated.00.pth and those that follow. UserError if one in between is missing."""
    found = {}
    for file in path.glob("consolidated.*.pth"):
        if match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name):
            found[int(match[1])] = file
    numbers = sorted(found)
    if numbers and (missing := sorted(set(range(numbers[-1])) - set(numbers))):
        names = ", ".join(f"consolidated.{n:02d}.pth" for n in missing)
        raise UserError(f"{path}: {names} is missing, each file holds a part of every matrix")
    return [found[n] for n in numbers]


def _read_params(file: Path) -> dict[str, Any]:
    params = read_json_object(file)
    params = params.get("model", params)
    if params.get("n_kv_heads") is None:
        params = params | {"n_kv_heads": params.get("n_heads")}
    needed = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"), int)
    needed |= {"norm_eps": (int, float)}
    problems = [
        f"{key} = {params.get(key)}: must be a number above 0"
        for key, kind in needed.items()
        if not isinstance(params.get(key), kind) or params[key] <= 0
    ]
    if "moe" in params or params.get("vision_chunk_size", -1) > 0:
        problems.append("moe, vision_chunk_size: only language models without experts are read")
    if problems:
        raise combine(problems, title=f"{file} does not describe a Llama:")
    return params


def _model_config(file: Path, params: dict[str, Any], source: MetaSource) -> ModelConfig:
    names = set(source.names())
    if absent := [name for name in (EMBEDDING, _GATE, _QUERY) if name not in names]:
        raise UserError(f"{file.parent}: the consolidated files hold no {absent[0]}")
    if params["n_layers"] > len(names):
        raise UserError(f"{file}: n_layers = {params['n_layers']}, for {len(names)} tensors")
    vocab_size = source.shape(EMBEDDING)[0]
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise UserError(
            f"{file}: vocab_size = {params['vocab_size']}, but the embedding has {vocab_size} "
            "rows: a consolidated file is missing, or is of another model"
        )
    # Meta stores the tied head of Llama 3.2 1B and 3B as well.
    tied = HEAD not in names or same_matrix(source, HEAD, EMBEDDING)
    return imported_model(
        file,
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=source.shape(_GATE)[0],
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params["n_kv_heads"],
        head_size=source.shape(_QUERY)[0] // params["n_heads"],
        rope_theta=float(params.get("rope_theta", _LLAMA2_THETA)),
        rope_scaling=_rope_scaling(file, params, tied=tied),
        norm_eps=float(params["norm_eps"]),
        tie_embeddings=tied,
        max_seq_len=params.get("max_seq_len"),
    )


def _rope_scaling(file: Path, params: dict[str, Any], *, tied: bool) -> dict[str, Any] | None:
    """Return Llama 3.1's scaling if `use_scaled_rope` asks for it.

    Its factor is 8 in Llama 3.1 and 3.3 and 32 in the models of Llama 3.2, whose params.json are
    alike; of these only 3.2's (1B and 3B) have a tied head.
    """
    if not params.get("use_scaled_rope", False):
        return None
    factor = next((params[key] for key in _FACTORS if params.get(key) is not None), None)
    if factor is None:
        factor = 32.0 if tied else 8.0
        models = "3.2, whose head is tied" if tied else "3.1 and 3.3, whose head is not tied"
        note(file, f"use_scaled_rope without a factor: {factor:g} is taken, that of Llama {models}")
    return {
        "factor": float(factor),
        "low_freq_factor": float(params.get("low_freq_factor", 1.0)),
        "high_freq_factor": float(params.get("high_freq_factor", 4.0)),
        "original_max_seq_len": 8192,
    }
