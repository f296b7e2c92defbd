"""Prints the training step beside that of transformers' LlamaForCausalLM under torch.compile.

    python benchmarks/against_torch.py [--dtype=float32] [--rounds=6] [--steps=3]

Same sizes, same initial weights, same random tokens, same AdamW and clipping, one document a row:
the losses printed at the end say so. Each system lives in a process of its own and waits for its
turn, so that only one computes at a time; turns alternate, and who begins a round, too. A busy
machine then slows both: read the ratios. Needs torch, transformers and, for torch.compile, gcc.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from train_step import arguments, compiled, random_rows, run_config  # the script beside this one

from llamajax.backends import with_huge_pages
from llamajax.config import RunConfig
from llamajax.config.schema import ComputeDtype, Remat
from llamajax.errors import UserError
from llamajax.formats.llama_sources import ModelSource
from llamajax.verbs import run_verb

SYSTEMS = ("llamajax", "torch")


def workload(flags: argparse.Namespace) -> RunConfig:
    """The run that both are given."""
    given = ["--backend=cpu", f"--preset={flags.preset}", f"--dtype={flags.dtype}"]
    given += [f"--batch={flags.batch}", f"--seq_len={flags.seq_len}", f"--remat={flags.remat}"]
    given += [f"--loss_chunk_tokens={flags.loss_chunk_tokens}", "--documents=0"]
    return run_config(arguments().parse_args(given))


def llamajax_step(config: RunConfig, weights: Path) -> Callable[[], float]:
    """llamajax's update; its initial weights are left in `weights` for the other one."""
    run = compiled(config, documents=0)
    source = ModelSource(run.state.model, config.model)
    np.savez(weights, **{name: source.read(name) for name in source.names()})
    return run.step


def torch_model(config: RunConfig, weights: Path) -> Any:
    """transformers' Llama of the same sizes with the weights in `weights`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    m = config.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            num_key_value_heads=m.num_kv_heads,
            head_dim=m.head_size,
            max_position_embeddings=m.max_seq_len,
            rms_norm_eps=m.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    stored = np.load(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(stored[name]))
    return model.train()


def torch_step(config: RunConfig, weights: Path, *, compiled: bool = True) -> Callable[[], float]:
    """The same update by torch: forward and backward under torch.compile, fused AdamW."""
    import torch

    model, o = torch_model(config, weights), config.optim
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        fused=True,
    )
    rows = torch.from_numpy(random_rows(config))
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    low = config.train.dtype == "bfloat16"

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(input_ids=tokens).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(flags: argparse.Namespace, config: RunConfig) -> None:
    """The child: a line with a number in, that many lines `loss seconds` out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints stays out of the answers
    if flags.worker == "llamajax":
        step = llamajax_step(config, flags.weights)
    else:
        step = torch_step(config, flags.weights, compiled=not flags.no_compile)
    for line in sys.stdin:
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            print(loss, time.perf_counter() - start, file=answers, flush=True)


class Worker:
    """One system in its process."""

    def __init__(self, system: str, argv: list[str], weights: Path):
        command = [sys.executable, __file__, *argv, f"--worker={system}", f"--weights={weights}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.system = system
        self.losses: list[float] = []

    def steps(self, count: int) -> list[float]:
        """Seconds of each of the next `count` steps."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        times = []
        for _ in range(count):
            answer = self.process.stdout.readline().split()
            if not answer:
                raise UserError(f"the {self.system} process ended early; see its messages above")
            self.losses.append(float(answer[0]))
            times.append(float(answer[1]))
        return times

    def close(self) -> None:
        """End the process, which leaves when nothing more can come."""
        self.process.stdin.close()
        self.process.wait()


def compare(flags: argparse.Namespace, argv: list[str]) -> None:
    """Run the rounds and print the table."""
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for system in SYSTEMS:  # one after the other: the first leaves its weights
                workers[system] = Worker(system, argv, Path(folder) / "weights.npz")
                workers[system].steps(2)
            rounds = []
            for i in range(flags.rounds):
                order = SYSTEMS if i % 2 == 0 else SYSTEMS[::-1]
                rounds.append({s: statistics.median(workers[s].steps(flags.steps)) for s in order})
                shown = ", ".join(f"{s} {rounds[-1][s]:.3f} s" for s in SYSTEMS)
                print(f"round {i + 1}: {shown}", file=sys.stderr, flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    print(report(flags, rounds, {s: w.losses for s, w in workers.items()}))


def report(
    flags: argparse.Namespace, rounds: list[dict[str, float]], losses: dict[str, list[float]]
) -> str:
    """The table of the rounds, and the losses."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "torch", "transformers"))
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, {versions}",
        f"{flags.preset}, {flags.batch} x {flags.seq_len} tokens, {flags.dtype}, "
        f"remat {flags.remat}, loss in chunks of {flags.loss_chunk_tokens}, "
        f"torch {'eager' if flags.no_compile else 'compiled'}"
        f"{' with huge pages' if flags.torch_huge_pages else ''}; "
        f"medians of {flags.steps} steps",
        "",
        "| round | llamajax s | torch s | llamajax / torch |",
        "| --- | ---: | ---: | ---: |",
    ]
    ratios = [r["llamajax"] / r["torch"] for r in rounds]
    for i, (r, ratio) in enumerate(zip(rounds, ratios, strict=True), 1):
        lines.append(f"| {i} | {r['llamajax']:.3f} | {r['torch']:.3f} | {ratio:.3f} |")
    medians = {s: statistics.median(r[s] for r in rounds) for s in SYSTEMS}
    tokens = flags.batch * flags.seq_len
    lines += [
        f"| median | {medians['llamajax']:.3f} | {medians['torch']:.3f} "
        f"| {statistics.median(ratios):.3f} |",
        "| tokens/s of the median | "
        + " | ".join(f"{tokens / medians[s]:,.0f}" for s in SYSTEMS)
        + " | |",
        "",
        "| loss of step | " + " | ".join(SYSTEMS) + " |",
        "| --- | ---: | ---: |",
    ]
    last = len(losses["torch"])
    for n in sorted({1, 2, 3, last // 2, last}):
        lines.append(f"| {n} | " + " | ".join(f"{losses[s][n - 1]:.5f}" for s in SYSTEMS) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Read the flags; be the parent or one of its children."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="bench-32m", help="a preset with an untied head")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--dtype", choices=get_args(ComputeDtype), default="float32")
    parser.add_argument("--remat", choices=get_args(Remat), default="dots", help="llamajax only")
    parser.add_argument("--loss_chunk_tokens", type=int, default=512, help="llamajax only")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps of each system a round")
    parser.add_argument("--no_compile", action="store_true", help="torch without torch.compile")
    parser.add_argument(
        "--torch_huge_pages", action="store_true", help="give torch the pages that llamajax takes"
    )
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.rounds < 1 or flags.steps < 1:
        raise UserError(f"--rounds={flags.rounds} --steps={flags.steps}: both at least 1")
    if flags.worker == "llamajax" or (flags.worker and flags.torch_huge_pages):
        with_huge_pages()
    config = workload(flags)
    if config.model.tie_embeddings:
        raise UserError(f"--preset={flags.preset}: has a tied head; choose one without")
    if flags.worker:
        work(flags, config)
    else:
        compare(flags, argv)


if __name__ == "__main__":
    run_verb(main)
