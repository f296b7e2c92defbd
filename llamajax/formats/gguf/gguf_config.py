"""Recognize a GGUF file, and read the architecture from its metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llama.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.config.model_schema import ModelConfig, RopeScaling
from llamajax.errors import UserError, combine
from llamajax.formats.foreign_weights import ForeignWeights, imported_model
from llamajax.formats.gguf.gguf_header import MAGIC, GgufHeader, read_gguf_header
from llamajax.formats.gguf.gguf_source import ROPE_FACTORS, GgufSource
from llamajax.formats.gguf.gguf_tokenizer import write_tokenizer
from llamajax.ops.rope import frequencies

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# The converter of llama.cpp keeps Llama 3.1's scaling as factors alone; these three are Llama's.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def recognize(path: Path) -> ForeignWeights | None:
    """Open a GGUF file, or a directory with one; return None for anything else.

    Raises UserError for a file that is not Llama's, or damaged, and for several in a directory.
    """
    file = _file(path)
    if file is None:
        return None
    header = read_gguf_header(file)
    model = _model_config(header)
    source = GgufSource(header, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads)
    return ForeignWeights(model=model, tokenizer=write_tokenizer(header), source=source)


def _file(path: Path) -> Path | None:
    if path.is_file():
        with path.open("rb") as stream:
            return path if path.suffix == ".gguf" or stream.read(4) == MAGIC else None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:10])
        raise UserError(
            f"{path} holds {len(files)} GGUF files, name one of them: {names}. Parts of one model "
            "are put together with llama.cpp's `llama-gguf-split --merge`"
        )
    return files[0] if files else None


def _model_config(header: GgufHeader) -> ModelConfig:
    """Return the architecture; UserError names whatever our model does not compute."""
    path, tensors = header.path, header.tensors
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: architecture {architecture!r}; only Llama's ('llama') can be imported"
        )
    if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
        raise UserError(
            f"{path}: no matrix {_EMBEDDING}: a part of a model, or only its vocabulary"
        )
    facts = _Facts(header.metadata)
    vocab_size, width = tensors[_EMBEDDING].shape
    heads = facts.get("attention.head_count", int)
    head_size = facts.get("attention.key_length", int, facts.get("rope.dimension_count", int, None))
    head_size = head_size or width // heads
    theta = facts.get("rope.freq_base", float, 10_000.0)
    model = {
        "vocab_size": vocab_size,
        "hidden_size": facts.get("embedding_length", int),
        "intermediate_size": facts.get("feed_forward_length", int),
        "num_layers": facts.get("block_count", int),
        "num_heads": heads,
        "num_kv_heads": facts.get("attention.head_count_kv", int, heads),
        "head_size": head_size,
        "rope_theta": theta,
        "norm_eps": facts.get("attention.layer_norm_rms_epsilon", float),
        "tie_embeddings": _HEAD not in tensors,
        "max_seq_len": facts.get("context_length", int),
    }
    if model["num_layers"] > len(tensors):
        facts.problems.append(f"llama.block_count: more than the {len(tensors)} tensors there are")
    facts.must_be("attention.value_length", head_size)
    facts.must_be("rope.dimension_count", head_size)
    facts.must_be("expert_count", 0)
    facts.must_be("attention.sliding_window", 0)
    scaling = _rope_scaling(header, facts)
    if facts.problems:
        raise combine(facts.problems, title=f"{path}: not a model that llamajax computes:")
    if ROPE_FACTORS in tensors:
        scaling = dataclasses.asdict(_llama3_scaling(header, facts, head_size, theta))
    return imported_model(path, rope_scaling=scaling, **model)


class _Facts:
    """Keys `llama.*`; `problems` lists what is missing or different from what it must be."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.problems: list[str] = []

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """Return a positive number of a type. Without a default, an absent one is a problem."""
        value = self._metadata.get(f"llama.{key}")
        if value is None and default:
            return default[0]
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            self.problems.append(f"llama.{key} = {value}: must be one {kind.__name__} above 0")
            return 1
        return value

    def must_be(self, key: str, expected: float) -> None:
        value = self._metadata.get(f"llama.{key}")
        if value is not None and value != expected:
            self.problems.append(f"llama.{key} = {value}: only {expected} can be imported")


def _rope_scaling(header: GgufHeader, facts: _Facts) -> dict[str, Any] | None:
    """Return the keys of a linear or yarn scaling; None where there is none.

    llama.cpp takes linear where no type is given. `attn_factor` multiplies what yarn computes;
    `yarn_attn_factor` is transformers' attention_factor, which replaces that (and which llama.cpp
    reads for other architectures only, as the two betas).
    """
    kind = header.metadata.get("llama.rope.scaling.type", "linear")
    factor = facts.get("rope.scaling.factor", float, facts.get("rope.scale_linear", float, 1.0))
    if ROPE_FACTORS in header.tensors and kind != "none" and factor != 1.0:
        facts.problems.append(f"{ROPE_FACTORS} and a scaling of type {kind}: one can be imported")
    if kind not in ("none", "linear", "yarn"):
        facts.problems.append(
            f"llama.rope.scaling.type = {kind!r}: only none, linear and yarn can be imported"
        )
    facts.must_be("rope.scaling.yarn_log_multiplier", 0.0)
    if kind != "yarn":
        facts.must_be("rope.scaling.attn_factor", 1.0)
        plain = kind == "none" or factor == 1.0
        return None if plain else {"type": kind, "factor": factor}
    facts.must_be("rope.scaling.yarn_ext_factor", 1.0)
    length = facts.get("rope.scaling.original_context_length", int, None)
    computed = 0.1 * math.log(max(factor, 1.0)) + 1.0
    attention = facts.get("rope.scaling.yarn_attn_factor", float, computed)
    attention *= facts.get("rope.scaling.attn_factor", float, 1.0)
    return {
        "type": kind,
        "factor": factor,
        "original_max_seq_len": length or facts.get("context_length", int),
        "beta_fast": facts.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": facts.get("rope.scaling.yarn_beta_slow", float, 1.0),
        "attention_factor": None if attention == computed else attention,
    }


def _llama3_scaling(header: GgufHeader, facts: _Facts, head_size: int, theta: float) -> RopeScaling:
    """Return Llama 3.1's scaling, recognized by the factors that each frequency is divided by."""
    factors = header.tensors[ROPE_FACTORS]
    content = header.content[factors.start : factors.start + 2 * head_size]
    if (factors.type_id, factors.shape, len(content)) != (0, (head_size // 2,), 2 * head_size):
        raise UserError(f"{header.path}: {ROPE_FACTORS} is not a vector of {head_size // 2} floats")
    stored = np.frombuffer(content, "<f4")
    scaling = RopeScaling(
        factor=float(str(stored.max())),
        low_freq_factor=_LOW,
        high_freq_factor=_HIGH,
        original_max_seq_len=facts.get("rope.scaling.original_context_length", int, _ORIGINAL),
    )
    plain = frequencies(head_size, theta=theta, scaling=None)
    ours = plain / frequencies(head_size, theta=theta, scaling=scaling)
    if not np.allclose(ours, stored, rtol=1e-4, atol=0):
        raise UserError(
            f"{header.path}: {ROPE_FACTORS} holds other factors than Llama 3.1's scaling by "
            f"{scaling.factor:g} of a context of {scaling.original_max_seq_len}; only that one "
            "can be imported"
        )
    return scaling
