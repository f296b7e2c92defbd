"""One system of `versus.py` in its own process: read `work.json`, then take steps on request.

    python versus_systems.py KIND FOLDER

Needs numpy and the system itself; of llamajax only the system `llamajax` needs anything, so the
others may run under another Python. In FOLDER are `work.json` (sizes and settings), `rows.npy`
(tokens), and `weights.npz` (initial weights by their Hugging Face names), which `llamajax` writes
with --initial. One line of JSON with versions is the first answer. Then a line with a number asks
for that many steps; each is answered by a line `loss seconds processor_seconds`.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, WEIGHTS, WORK = "rows.npy", "weights.npz", "work.json"
PACKAGES = {
    "llamajax": ("jax", "jaxlib", "flax", "optax"),
    "torch": ("torch", "transformers"),
    "litgpt": ("torch", "litgpt"),
    "maxtext": ("jax", "jaxlib", "flax", "maxtext"),
}  # of each kind of system


def llamajax_step(work: dict[str, Any], folder: Path, *, initial: bool) -> Callable[[], float]:
    """llamajax's update; with `initial` its first weights and its rows are left for the others."""
    from train_step import StepFlags, compiled, random_rows, run_config  # the script beside this

    from llamajax.formats.llama_sources import ModelSource

    config = run_config(StepFlags.parse(work["flags"]))
    run = compiled(config, documents=0)
    if initial:
        source = ModelSource(run.state.model, config.model)
        np.savez(folder / WEIGHTS, **{name: source.read(name) for name in source.names()})
        np.save(folder / ROWS, random_rows(config))
    return run.step


def transformers_llama(model: dict[str, Any]) -> Any:
    """Return transformers' Llama of these sizes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model["vocab_size"],
            hidden_size=model["hidden_size"],
            intermediate_size=model["intermediate_size"],
            num_hidden_layers=model["num_layers"],
            num_attention_heads=model["num_heads"],
            num_key_value_heads=model["num_kv_heads"],
            head_dim=model["head_size"],
            max_position_embeddings=model["max_seq_len"],
            rms_norm_eps=model["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
            tie_word_embeddings=model["tie_embeddings"],
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,  # the embedding of a padding token would not be trained
        )
    )


def transformers_model(model: dict[str, Any], weights: dict[str, Any]) -> tuple[Any, Callable]:
    """Return transformers' Llama, and the function from tokens to logits that it is."""
    network = transformers_llama(model)
    network.config.use_cache = False
    network.load_state_dict(weights)
    return network, lambda tokens: network(input_ids=tokens).logits


def litgpt_model(model: dict[str, Any], weights: dict[str, Any]) -> tuple[Any, Callable]:
    """Return litgpt's GPT, sized as a Llama; it is the function from tokens to logits itself."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    config = Config(
        block_size=model["max_seq_len"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        n_layer=model["num_layers"],
        n_head=model["num_heads"],
        n_query_groups=model["num_kv_heads"],
        head_size=model["head_size"],
        n_embd=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        rope_base=int(model["rope_theta"]),
        norm_eps=model["norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    network, found = GPT(config), {}
    copy_weights_hf_llama(config, {}, found, dict(weights))
    network.load_state_dict(found)
    return network, network


MODELS = {"torch": transformers_model, "litgpt": litgpt_model}


def torch_step(kind: str, work: dict[str, Any], folder: Path) -> Callable[[], float]:
    """Return the same update by torch: forward and backward compiled, fused AdamW."""
    import torch

    optim, device = work["optim"], torch.device(work["torch_device"])
    weights = {k: torch.from_numpy(v) for k, v in np.load(folder / WEIGHTS).items()}
    network, logits_of = MODELS[kind](work["model"], weights)
    network.train().to(device)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=optim["learning_rate"],
        betas=(optim["beta1"], optim["beta2"]),
        eps=optim["epsilon"],
        weight_decay=optim["weight_decay"],
        fused=True,
    )
    rows = torch.from_numpy(np.load(folder / ROWS)).to(device)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    low = work["dtype"] == "bfloat16"

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = logits_of(tokens).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if work["torch_compile"] else loss_of

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()  # the loss alone is there before the update is
        return loss.item()

    return step


def serve(step: Callable[[], float], versions: dict[str, str], answers: Any) -> None:
    """Answer requests for steps until standard input ends."""
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            wall, processor = time.perf_counter(), time.process_time()
            loss = step()
            taken = time.perf_counter() - wall, time.process_time() - processor
            print(loss, *taken, file=answers, flush=True)


def main() -> None:
    """Be one system."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("kind", choices=PACKAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--initial", action="store_true", help="write weights and rows")
    flags = parser.parse_args()
    if flags.kind == "llamajax":
        from llamajax.backends import with_huge_pages

        with_huge_pages()  # as llamajax.train does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints stays out of the answers
    work = json.loads((flags.folder / WORK).read_text())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[flags.kind]}
    versions["python"] = sys.version.split()[0]
    if flags.kind == "llamajax":
        step = llamajax_step(work, flags.folder, initial=flags.initial)
    elif flags.kind == "maxtext":
        from versus_maxtext import maxtext_step  # the script beside this one

        rows, weights = np.load(flags.folder / ROWS), np.load(flags.folder / WEIGHTS)
        step = maxtext_step(work, rows.astype(np.int32), weights, flags.folder)
    else:
        step = torch_step(flags.kind, work, flags.folder)
    serve(step, versions, answers)


if __name__ == "__main__":
    main()
