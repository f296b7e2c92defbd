"""Directories as `prepare` and `train` leave them, and the rows of their files."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from llamajax import convert, prepare
from llamajax.checkpoint import Checkpointer
from llamajax.config.schema import ModelConfig
from llamajax.corpus.input_patterns import InputFile, find_inputs
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.models.llama import Llama


def read_rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(workdir: Path) -> list[dict]:
    """What a run logged, without what is measured, in order: an evaluation follows its step."""
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "eval_loss")
    rows = read_rows(workdir / "metrics.jsonl")
    found = [{name: row[name] for name in names if name in row} for row in rows]
    return sorted(found, key=lambda row: (row["step"], "eval_loss" in row))


def write_rows(path: Path, *rows: dict) -> Path:
    """Write a file of JSON lines; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def run_prepare(source: Path, output: Path, *flags: str, tokenizer: str = "byte") -> int:
    """Prepare files with one worker, in this process."""
    where = (f"--input={source}", f"--output={output}", f"--tokenizer={tokenizer}")
    return prepare.main([*where, "--workers=1", *flags])


def prepare_texts(
    folder: Path, texts: Iterable[str], *flags: str, tokenizer: str = "byte", held_out: float = 0.05
) -> Path:
    """Prepare texts as `folder/data` with one worker; they stay in `folder/corpus.jsonl`."""
    corpus = write_rows(folder / "corpus.jsonl", *({"text": text} for text in texts))
    output, held = folder / "data", f"--validation_fraction={held_out}"
    run_prepare(corpus, output, held, *flags, tokenizer=tokenizer)
    return output


def prepare_options(**fields: Any) -> PrepareOptions:
    """The flags of `prepare`, for its parts."""
    return PrepareOptions(**{"input": "", "tokenizer": "byte", "output": "out", **fields})


def inputs(*patterns: Path | str, **fields: Any) -> list[InputFile]:
    """The files of --input, with the options of each."""
    return find_inputs(prepare_options(input=",".join(map(str, patterns)), **fields))


def save_checkpoint(workdir: Path, step: int, state: Any, **meta: Any) -> Path:
    """Save one checkpoint of a run; return the workdir."""
    options = {"keep": 5, "keep_every": None, "asynchronous": False}
    with Checkpointer(workdir / "checkpoints", **options) as saver:
        saver.save(step, state, meta=meta, wait=True)
    return workdir


def save_random(workdir: Path, model: ModelConfig) -> Path:
    """Save one checkpoint of a model with random weights, as step 3; return the workdir."""
    weights = jax.jit(lambda key: Llama(model, key))(jax.random.key(0))
    config = {"model": dataclasses.asdict(model)}
    return save_checkpoint(workdir, 3, {"model": weights}, config=config)


def export_poisoned(run: Path, target: Path, token: int) -> Path:
    """Export the weights of a run with NaN in the embedding of one token."""
    convert.main([f"--from={run}", f"--to={target}", "--dtype=float32"])
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return target
