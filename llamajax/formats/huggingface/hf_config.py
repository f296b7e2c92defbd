"""Convert between a Llama's `config.json` and ModelConfig. Reads old and new keys, writes both."""

from collections.abc import Iterator, Mapping
from typing import Any

from llamajax.config import build_model
from llamajax.config.schema import ModelConfig

# Theirs -> ours, all required: transformers' own defaults for these are one particular model's.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}
# What transformers takes where the key is absent: Llama 1 and 2 were published without it.
_ROPE_THETA = 10_000.0
_INIT_STD = 0.02


def read_model_config(config: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """Return the architecture that a `config.json` describes, or None and every problem."""
    problems = list(_unsupported(config))
    if problems and config.get("model_type") != "llama":
        return None, problems  # another architecture's keys would only add noise
    problems += [f"config.json: {name} is missing" for name in _KEYS if config.get(name) is None]
    rope, found = _rope(config)
    problems += found
    if problems:
        return None, problems
    heads, width = config["num_attention_heads"], config["hidden_size"]
    divides = isinstance(heads, int) and isinstance(width, int) and heads > 0
    ours = {ours: config[theirs] for theirs, ours in _KEYS.items()}
    ours |= rope
    ours |= {
        "num_kv_heads": _get(config, "num_key_value_heads", heads),
        "head_size": _get(config, "head_dim", width // heads if divides else 2),
        "tie_embeddings": _get(config, "tie_word_embeddings", False),
        "init_std": _get(config, "initializer_range", _INIT_STD),
    }
    return build_model(ours)


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return a value; null counts as absent."""
    value = config.get(key)
    return default if value is None else value


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what our model does not compute."""
    kind = config.get("model_type")
    if kind != "llama":
        yield f"config.json: model_type {kind!r} is not supported; only llama is"
    names = config.get("architectures")
    if kind == "llama" and names and "LlamaForCausalLM" not in names:
        yield f"config.json: architectures {names} is not supported; only LlamaForCausalLM is"
    if (act := _get(config, "hidden_act", "silu")) not in ("silu", "swish"):
        yield f"config.json: hidden_act {act!r} is not supported; only silu is"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"config.json: {key} is true; only models without biases are supported"
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        yield (
            f"config.json: quantization_config ({method}): quantized weights are not supported; "
            "use the model's bf16, fp16 or fp32 weights"
        )


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our keys of the rotary embedding, and problems.

    Up to transformers 4: `rope_theta` and `rope_scaling` (its kind under `type` or `rope_type`);
    from 5: all in `rope_parameters`. Where both are given, transformers 5 prefers `rope_scaling`.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return {}, [f"config.json: rope_scaling {given!r} is not a dict"]
    theta = _get(given, "rope_theta", _get(config, "rope_theta", _ROPE_THETA))
    partial = _get(given, "partial_rotary_factor", config.get("partial_rotary_factor"))
    kind = _get(given, "rope_type", _get(given, "type", "default"))
    problems = []
    if partial not in (None, 1, 1.0):
        problems.append(f"config.json: partial_rotary_factor {partial} is not supported; only 1 is")
    if kind not in ("default", "llama3"):
        problems.append(
            f"config.json: rope type {kind!r} is not supported; only default and llama3 are"
        )
    if kind != "llama3":
        return {"rope_theta": theta, "rope_scaling": None}, problems
    missing = [key for key in _SCALING if given.get(key) is None]
    problems += [f"config.json: rope type llama3 without {key}" for key in missing]
    scaling = {ours: given.get(theirs) for theirs, ours in _SCALING.items()}
    return {"rope_theta": theta, "rope_scaling": scaling}, problems


def write_model_config(model: ModelConfig, *, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of an architecture.

    It has every key, so that no version fills in its own default, and both spellings of what
    transformers 5 renamed. That version reads `rope_scaling` first where it is not null, so the
    two say the same.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        scaling = {theirs: getattr(model.rope_scaling, ours) for theirs, ours in _SCALING.items()}
        rope = {"rope_type": "llama3", **scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for theirs, ours in _KEYS.items()},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id")},
        "pad_token_id": None,  # would freeze its row; generation_config.json has it
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
