"""Prints how fast the training step is here: speed, both MFUs, memory and start-up, as one table.

    python benchmarks/train_step.py --preset=bench-32m --batch=4 --seq_len=512 --dtype=float32
    python benchmarks/train_step.py --preset=tiny --batch=8 --seq_len=64 \
        --backend=cpu --num_cpu_devices=8 --mesh=fsdp=4,tensor=2

The step is that of `llamajax.train`: float32 weights, AdamW with clipping, document masks, donated
state. Tokens are random, drawn once and reused. Every step is waited for before the next begins,
so a step's time is never that of its dispatch. Runs on whatever backend JAX finds.
"""

import argparse
import dataclasses
import datetime
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from llamajax.backends import with_huge_pages
from llamajax.config import RunConfig, freeze, mesh_config, new_config, preset
from llamajax.config.schema import AttentionImpl, ComputeDtype, Remat
from llamajax.errors import UserError
from llamajax.verbs import run_verb

WARM_UP = 2  # steps after the first that are not counted


@dataclasses.dataclass
class Run:
    """A compiled step with everything it needs; `step()` is one update, waited for."""

    config: RunConfig
    machine: Any
    mesh: Any
    attention: str
    compile_s: float
    update: Callable
    state: Any
    batch: dict[str, Any]

    def step(self) -> float:
        """The loss of one more update; returns when the whole new state exists."""
        import jax

        self.state, metrics = self.update(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def run_config(flags: argparse.Namespace) -> RunConfig:
    """The checked run that the flags describe. UserError for what does not fit together."""
    config = new_config()
    config.model = preset(flags.preset)
    config.mesh.update(dataclasses.asdict(mesh_config(flags.mesh, rest="fsdp")))
    config.data.update(
        path="random", seq_len=flags.seq_len, global_batch_size=flags.batch, seed=flags.seed
    )
    config.train.update(
        steps=flags.steps + WARM_UP + 1,
        seed=flags.seed,
        dtype=flags.dtype,
        remat=flags.remat,
        attention=flags.attention,
        accumulation_steps=flags.accumulation,
        loss_chunk_tokens=flags.loss_chunk_tokens,
    )
    config.optim.update(
        learning_rate=3e-4,
        warmup_steps=0,
        schedule="constant",
        final_learning_rate=3e-4,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.backend.update(
        name=flags.backend,
        plugin=flags.plugin,
        options=flags.options,
        num_cpu_devices=flags.num_cpu_devices,
    )
    return freeze(config, source="these flags, as config keys")


def random_rows(config: RunConfig) -> Any:
    """Tokens (B, T + 1), a function of data.seed."""
    import numpy as np

    shape = (config.data.global_batch_size, config.data.seq_len + 1)
    return np.random.default_rng(config.data.seed).integers(config.model.vocab_size, size=shape)


def compiled(config: RunConfig, *, document_masks: bool = True) -> Run:
    """The step as a run builds it, compiled, with its first state and one batch on the devices."""
    import jax
    import numpy as np

    from llamajax import backends, optim, sharding
    from llamajax.training.setup import check_mesh, layout_of, resolve_compute
    from llamajax.training.state import init_state
    from llamajax.training.step import train_step

    machine = backends.start(config.backend)
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    check_mesh(config, mesh)
    compute = resolve_compute(config, machine, mesh)
    optimizer = optim.build(config.optim, steps=config.train.steps)
    seed, layout = config.train.seed, layout_of(config)
    state = init_state(config.model, optimizer, mesh, seed=seed, layout=layout)
    state = jax.block_until_ready(state)
    ids = random_rows(config).astype(np.int32)
    tokens = np.ascontiguousarray(ids[:, :-1])
    batch = {
        "tokens": tokens,
        "targets": np.ascontiguousarray(ids[:, 1:]),
        "positions": np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
        "loss_mask": np.ones(tokens.shape, bool),
    }
    if document_masks:
        batch["segment_ids"] = np.ones_like(tokens)
    batch = sharding.put_batch(batch, mesh)
    start = time.perf_counter()
    update = train_step(optimizer, config.optim, config.train, compute, mesh, config.guard)
    update = update.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    return Run(config, machine, mesh, compute.attention, compile_s, update, state, batch)


def seconds_alive() -> float | None:
    """Time since this process was started; None where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot, proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def table(run: Run, times: list[float], *, start_up_s: float | None) -> str:
    """Everything measured, as the rows of one Markdown table."""
    from llamajax import backends, sharding
    from llamajax.models.counts import flops_per_token, num_parameters

    config, machine = run.config, run.machine
    tokens = config.data.global_batch_size * config.data.seq_len
    median = statistics.median(times)
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)
    mfu = {}
    for name, causal in (("full", False), ("causal", True)):
        flops = flops_per_token(config.model, config.data.seq_len, causal=causal)
        reached = tokens / median * flops / machine.num_devices
        mfu[name] = f"{100 * reached / peak[0]:.1f} %" if peak else "null, peak unknown"
        mfu[name] += f" ({reached / 1e12:.3g} TFLOP/s a device)"
    memory = max(backends.memory_in_use().get("peak_memory_bytes", []), default=None)
    kind = "device statistics" if memory else "process peak RSS"
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    t = config.train
    rows = {
        "model": f"{config.model.name}, {num_parameters(config.model):,} parameters",
        "machine": f"{machine.platform}, {machine.device_kind}, {sharding.describe(run.mesh)}",
        "date, versions": f"{datetime.date.today()}, jax {machine.versions['jax']}, "
        f"flax {machine.versions['flax']}",
        "batch": f"{config.data.global_batch_size} x {config.data.seq_len} = {tokens:,} tokens, "
        f"{t.accumulation_steps} microbatch(es)",
        "compute": f"{t.dtype}, attention {run.attention}, remat {t.remat}, "
        f"loss in chunks of {t.loss_chunk_tokens}",
        "tokens/s": f"{tokens / median:,.0f} ({tokens / median / machine.num_devices:,.0f} "
        "a device)",
        "step time": f"median {median * 1e3:.1f} ms, min {min(times) * 1e3:.1f}, "
        f"max {max(times) * 1e3:.1f}, of {len(times)} steps",
        "MFU, full attention matrix": mfu["full"],
        "MFU, causal half of it": mfu["causal"],
        "peak memory": f"{memory / 2**20:,.0f} MiB ({kind})",
        "start-up": f"{start_up_s:.1f} s from process start to first step done"
        if start_up_s
        else "unknown: no /proc",
        "of it compiling the step": f"{run.compile_s:.1f} s",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="bench-32m", help="a model of llamajax.config.PRESETS")
    parser.add_argument("--batch", type=int, default=4, help="samples a step, over all devices")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens a sample")
    parser.add_argument("--dtype", choices=get_args(ComputeDtype), default="float32")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--remat", choices=get_args(Remat), default="dots")
    parser.add_argument("--attention", choices=get_args(AttentionImpl), default="auto")
    parser.add_argument("--accumulation", type=int, default=1, help="microbatches a step")
    parser.add_argument("--loss_chunk_tokens", type=int, default=512)
    parser.add_argument("--mesh", help="AXIS=SIZE,...; default: all devices along fsdp")
    parser.add_argument("--backend", help="JAX platform; none: what JAX finds")
    parser.add_argument("--plugin", help="bare PJRT plugin library that serves --backend")
    parser.add_argument("--options", help="options of that plugin, k=v,k=v")
    parser.add_argument("--num_cpu_devices", type=int, help="virtual devices of the cpu backend")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    return parser


def main(argv: list[str]) -> None:
    """Measure and print."""
    flags = arguments().parse_args(argv)
    if flags.steps < 1:
        raise UserError(f"--steps={flags.steps}: at least one step has to be timed")
    run = compiled(run_config(flags))
    run.step()
    start_up_s = seconds_alive()
    times = []
    for i in range(-WARM_UP, flags.steps):
        start = time.perf_counter()
        run.step()
        if i >= 0:
            times.append(time.perf_counter() - start)
    if run.machine.is_primary:
        print(table(run, times, start_up_s=start_up_s))


if __name__ == "__main__":
    with_huge_pages()  # as llamajax.train does
    run_verb(main)
