"""The weights of the small Llamas as llama.cpp's converter names and orders them."""

import numpy as np
from llama_cases import weights
from meta_cases import interleaved

from llamajax.config.schema import ModelConfig

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_metadata(c: ModelConfig) -> dict[str, int | float]:
    """The architecture in llama.cpp's keys."""
    return {
        "llama.block_count": c.num_layers,
        "llama.context_length": c.max_seq_len,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_heads,
        "llama.attention.head_count_kv": c.num_kv_heads,
        "llama.attention.key_length": c.head_size,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "llama.rope.dimension_count": c.head_size,
    }


def as_gguf(c: ModelConfig) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, q and k interleaved."""
    found = {}
    for name, weight in weights(c).items():
        name = name.removesuffix(".weight")
        if "layers." not in name:
            found[f"{NAMES[name]}.weight"] = weight
            continue
        _, _, layer, part = name.split(".", 3)
        heads = {"self_attn.q_proj": c.num_heads, "self_attn.k_proj": c.num_kv_heads}.get(part)
        found[f"blk.{layer}.{NAMES[part]}.weight"] = interleaved(weight, heads) if heads else weight
    return found
