"""MaxText as a system of `versus.py`: its own training step, fed with given weights and tokens.

MaxText 0.2.5 keeps the scale of the scores in the query's weights, so that AdamW moves these more
than the others' by the square root of the head size, and decays norms as well: the loss of the
first step is the others', later ones are near it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import maxtext
import numpy as np
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils


def maxtext_config(work: dict[str, Any], batch: int, seq_len: int, folder: Path) -> Any:
    """Return MaxText's config of the work; dots are kept for the backward pass (`minimal`)."""
    m, optim, is_cpu = work["model"], work["optim"], work["torch_device"] == "cpu"
    keys = {
        "run_name": "versus", "base_output_directory": folder, "enable_checkpointing": False,
        "dataset_type": "synthetic", "steps": 1_000_000, "log_config": False,
        "enable_goodput_recording": False, "skip_jax_distributed_system": True,
        "hardware": "cpu" if is_cpu else "gpu",
        "attention": "dot_product" if is_cpu else "cudnn_flash_jax",
        "decoder_block": "llama2", "mlp_activations": "['silu','linear']",
        "base_emb_dim": m["hidden_size"], "base_mlp_dim": m["intermediate_size"],
        "base_num_decoder_layers": m["num_layers"], "base_num_query_heads": m["num_heads"],
        "base_num_kv_heads": m["num_kv_heads"], "head_dim": m["head_size"],
        "vocab_size": m["vocab_size"], "normalization_layer_epsilon": m["norm_eps"],
        "rope_max_timescale": int(m["rope_theta"]), "logits_via_embedding": False,
        "max_target_length": seq_len, "per_device_batch_size": batch, "dtype": work["dtype"],
        "weight_dtype": "float32", "remat_policy": "minimal", "opt_type": "adamw",
        "learning_rate": optim["learning_rate"], "warmup_steps_fraction": 0.0,
        "learning_rate_final_fraction": 1.0, "adam_b1": optim["beta1"], "adam_b2": optim["beta2"],
        "adam_eps": optim["epsilon"], "adam_weight_decay": optim["weight_decay"],
        "gradient_clipping_threshold": optim["clip_norm"],
    }  # fmt: skip
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in keys.items())])


def maxtext_weights(m: dict[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights by the ends of MaxText's names, from those by Hugging Face's."""

    def layers(name: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
        names = [f"model.layers.{n}.{name}.weight" for n in range(m["num_layers"])]
        return np.stack([weights[each].T.reshape(shape) for each in names], axis=1)

    D, F, H = m["hidden_size"], m["intermediate_size"], m["head_size"]
    return {
        "['token_embedder']['embedding']": weights["model.embed_tokens.weight"],
        "['decoder_norm']['scale']": weights["model.norm.weight"],
        "['logits_dense']['kernel']": weights["lm_head.weight"].T,
        "['pre_self_attention_layer_norm']['scale']": layers("input_layernorm"),
        "['post_self_attention_layer_norm']['scale']": layers("post_attention_layernorm"),
        "['query']['kernel']": layers("self_attn.q_proj", (D, -1, H)) / np.float32(H**0.5),
        "['key']['kernel']": layers("self_attn.k_proj", (D, -1, H)),
        "['value']['kernel']": layers("self_attn.v_proj", (D, -1, H)),
        "['out']['kernel']": layers("self_attn.o_proj", (-1, H, D)),
        "['wi_0']['kernel']": layers("mlp.gate_proj", (D, F)),
        "['wi_1']['kernel']": layers("mlp.up_proj", (D, F)),
        "['wo']['kernel']": layers("mlp.down_proj", (F, D)),
    }


def maxtext_step(
    work: dict[str, Any], rows: np.ndarray, weights: Mapping[str, np.ndarray], folder: Path
) -> Callable[[], float]:
    """Return MaxText's update of these weights on these rows (B, T + 1), which gives the loss."""
    B, T = rows.shape[0], rows.shape[1] - 1
    config = maxtext_config(work, B, T, folder)
    _, _, shardings, _, mesh, *_, whole = train_utils.setup_train_loop(config, None)
    graph, state = nnx.split(whole)
    of_weights, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    update, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, of_weights
    )
    left = maxtext_weights(work["model"], weights)

    def given(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path).removesuffix(".value")
        end = next((end for end in left if name.endswith(end)), None)
        if end is None or not name.startswith("['model']"):
            return x
        assert left[end].shape == x.shape, f"{name}: {left[end].shape}, not {x.shape}"
        return jax.device_put(left.pop(end), x.sharding)

    state = jax.tree_util.tree_map_with_path(given, state)
    assert not left, f"MaxText has no weights {', '.join(left)}"
    places, one = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)
    batch = {"inputs": rows[:, :-1], "inputs_position": places, "inputs_segmentation": one}
    batch |= {"targets": rows[:, 1:], "targets_position": places, "targets_segmentation": one}

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh), train.logical_axis_rules(config.logical_axis_rules):
            state, metrics = update(state, batch)
        jax.block_until_ready(state)
        return float(metrics["scalar"]["learning/lm_loss"])

    return step
