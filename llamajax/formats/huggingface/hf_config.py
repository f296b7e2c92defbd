"""Convert between a Llama's `config.json` and ModelConfig. Reads old and new keys, writes both."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from llamajax.config import build_model
from llamajax.config.model_schema import ROPE_KEYS, ModelConfig
from llamajax.errors import did_you_mean, nearest

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
_ORIGINAL = "original_max_position_embeddings"
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
    from 5: all in `rope_parameters`. Where both are given, transformers 5 prefers `rope_scaling`;
    and `original_max_position_embeddings` beside them to the one inside. Where there is none, it
    takes max_position_embeddings, which may be the scaled context: that is refused here.
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
    if kind not in ("default", *ROPE_KEYS):
        problems.append(
            f"config.json: rope type {kind!r} is not supported; only default, "
            f"{', '.join(ROPE_KEYS)} are{did_you_mean(nearest(str(kind), ROPE_KEYS))}"
        )
    if kind not in ROPE_KEYS or (kind == "linear" and given.get("factor") == 1):
        return {"rope_theta": theta, "rope_scaling": None}, problems
    given = dict(given) | {_ORIGINAL: _get(config, _ORIGINAL, given.get(_ORIGINAL))}
    if kind == "yarn":
        problems += _complete_yarn(given, config.get("max_position_embeddings"))
    required, optional = ROPE_KEYS[kind]
    found = {name: given.get(_theirs(name)) for name in (*required, *optional)}
    missing = [_theirs(name) for name in required if found[name] is None]
    problems += [f"config.json: rope type {kind} without {key}" for key in missing]
    scaling = {name: value for name, value in found.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **scaling}}, problems


def _complete_yarn(given: dict[str, Any], longest: Any) -> list[str]:
    """Add the factors that transformers derives from other keys of yarn; return problems."""
    names = ("factor", _ORIGINAL, "mscale", "mscale_all_dim")
    factor, original, *scales = values = [given.get(name) for name in names]
    wrong = [
        f"config.json: rope type yarn: {name} {value!r} is not a number above 0"
        for name, value in zip(names, values, strict=True)
        if value is not None and not (isinstance(value, int | float) and value > 0)
    ]
    if wrong or original is None or not isinstance(longest, int):
        return wrong
    given["factor"] = factor = longest / original if factor is None else factor
    if given.get("attention_factor") is None and None not in scales:
        grown = [1 + 0.1 * scale * math.log(max(factor, 1)) for scale in scales]
        given["attention_factor"] = grown[0] / grown[1]
    return []


def _theirs(name: str) -> str:
    """Return what transformers calls a key of RopeScaling."""
    return _ORIGINAL if name == "original_max_seq_len" else name


def write_model_config(model: ModelConfig, *, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of an architecture.

    It has every key, so that no version fills in its own default, and both spellings of what
    transformers 5 renamed. That version reads `rope_scaling` first where it is not null, so the
    two say the same.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := model.rope_scaling) is not None:
        required, optional = ROPE_KEYS[scaling.type]
        values = {_theirs(name): getattr(scaling, name) for name in (*required, *optional)}
        kept = {k: value for k, value in values.items() if value is not None and value is not True}
        rope = {"rope_type": scaling.type, **kept}
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
