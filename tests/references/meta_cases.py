"""Meta's consolidated files: names, the order of q and k, and how tensors are split over files."""

from typing import Any

import llama_cases
import numpy as np

from llamajax.config.schema import ModelConfig

# Their name of a layer's tensor, and the dimension that it is split along.
LAYER = {
    "input_layernorm": ("attention_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}
# Half precision: the bits that torch.save writes are compared with those of NumPy.
HALF = llama_cases.Draw(2).uniform((6, 10), mean=0.0, std=1.0)


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of q or k as Meta does: both partners of a rotary pair side by side."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(weight.shape)


def _whole(c: ModelConfig, weights: dict[str, np.ndarray], *, split_rows: bool) -> dict[str, Any]:
    """Their name -> (whole tensor, dimension it is split along, None for none)."""
    found: dict[str, Any] = {"rope.freqs": (np.ones(c.head_size // 2, np.float32), None)}
    for name, weight in weights.items():
        if name == "model.embed_tokens.weight":
            found["tok_embeddings.weight"] = (weight, 0 if split_rows else 1)
        elif name == "lm_head.weight":
            found["output.weight"] = (weight, 0)
        elif name == "model.norm.weight":
            found["norm.weight"] = (weight, None)
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            theirs, dim = LAYER[part]
            heads = {"attention.wq": c.num_heads, "attention.wk": c.num_kv_heads}.get(theirs)
            weight = interleaved(weight, heads) if heads else weight
            found[f"layers.{layer}.{theirs}.weight"] = (weight, dim)
    return found


def meta_files(
    c: ModelConfig, weights: dict[str, np.ndarray], *, files: int, split_rows: bool = True
) -> list[dict[str, np.ndarray]]:
    """The tensors of each file."""
    whole = _whole(c, weights, split_rows=split_rows)
    return [
        {n: w if dim is None else np.split(w, files, dim)[i] for n, (w, dim) in whole.items()}
        for i in range(files)
    ]


def meta_params(c: ModelConfig) -> dict[str, Any]:
    """The contents of params.json."""
    return {
        "dim": c.hidden_size,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "n_kv_heads": c.num_kv_heads,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "vocab_size": -1,
        "multiple_of": 256,
        "max_seq_len": c.max_seq_len,
    }
