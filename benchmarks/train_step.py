"""Prints how fast the training step is here: speed, both MFUs, memory and start-up, as one table.

    python benchmarks/train_step.py --preset=bench-32m --batch=4 --seq_len=512 --dtype=float32
    python benchmarks/train_step.py --preset=tiny --batch=8 --seq_len=64 \
        --backend=cpu --num_cpu_devices=8 --mesh=fsdp=4,tensor=2

The step is that of `llamajax.train`: float32 weights, AdamW with clipping, document masks, donated
state. Tokens are random, drawn once and reused. Steps are timed twice: each waited for before the
next begins, and a window of them dispatched without waiting, as a run does it. Speed and MFU are
those of the window. Runs on whatever backend JAX finds, with jax, flax, optax and orbax alone.
"""

import argparse
import dataclasses
import datetime
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from llamajax.backends import with_huge_pages
from llamajax.config import RunConfig, find_preset, freeze, mesh_config
from llamajax.config.schema import AttentionImpl, ComputeDtype, Remat, TrainDtype
from llamajax.config.values import describe
from llamajax.errors import UserError, say
from llamajax.files import target_problem, write_file
from llamajax.verbs import run_verb

WARM_UP = 2  # steps after the first that are not counted


class DoesNotFit(UserError):
    """A compiled step that takes more memory than the device has."""


@dataclasses.dataclass
class Run:
    """A compiled step with everything it needs; `step()` is one update, waited for."""

    config: RunConfig
    machine: Any
    mesh: Any
    attention: Any  # AttentionChoice
    options: Any  # CompilerOptions
    compile_s: float
    update: Callable  # the compiled program
    state: Any
    batch: dict[str, Any]

    def step(self) -> float:
        """The loss of one more update; returns when the whole new state exists."""
        import jax

        metrics = self.dispatch()
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def dispatch(self) -> dict[str, Any]:
        """Start one more update and return its metrics, for which nobody has waited yet."""
        self.state, metrics = self.update(self.state, self.batch)
        return metrics


def run_config(flags: argparse.Namespace) -> RunConfig:
    """The checked run that the flags describe. UserError for what does not fit together."""
    found = {
        "model": dataclasses.asdict(find_preset(flags.preset)),
        "mesh": dataclasses.asdict(mesh_config(flags.mesh or "fsdp=-1")),
        "data": {
            "path": "random",
            "seq_len": flags.seq_len,
            "global_batch_size": flags.batch,
            "seed": flags.seed,
            "mask_documents": flags.documents > 0,
        },
        "train": {
            "steps": 2 * flags.steps + WARM_UP + 1,
            "seed": flags.seed,
            "dtype": flags.dtype,
            "remat": flags.remat,
            "remat_keep": tuple(filter(None, flags.remat_keep.split(","))),
            "attention": flags.attention,
            "accumulation_steps": flags.accumulation,
            "loss_chunk_tokens": flags.loss_chunk_tokens,
        },
        "optim": {
            "learning_rate": 3e-4,
            "warmup_steps": 0,
            "schedule": "constant",
            "final_learning_rate": 3e-4,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "moment_dtype": flags.moment_dtype,
        },
        "backend": {
            "name": flags.backend,
            "plugin": flags.plugin,
            "options": flags.options,
            "num_cpu_devices": flags.num_cpu_devices,
            "device_table": flags.device_table,
        },
    }
    return freeze(found, source="these flags, as config keys")


def random_rows(config: RunConfig) -> Any:
    """Tokens (B, T + 1), a function of data.seed."""
    import numpy as np

    shape = (config.data.global_batch_size, config.data.seq_len + 1)
    return np.random.default_rng(config.data.seed).integers(config.model.vocab_size, size=shape)


def random_batch(config: RunConfig, *, documents: int) -> dict[str, Any]:
    """A host's batch of random tokens, each row cut into that many documents of one length."""
    import numpy as np

    rows, T = random_rows(config).astype(np.int32), config.data.seq_len
    ids_T = np.arange(T, dtype=np.int32) * max(documents, 1) // T
    starts_T = np.searchsorted(ids_T, ids_T).astype(np.int32)
    batch = {
        "tokens": np.ascontiguousarray(rows[:, :-1]),
        "targets": np.ascontiguousarray(rows[:, 1:]),
        "positions": np.tile(np.arange(T, dtype=np.int32) - starts_T, (len(rows), 1)),
        "loss_mask": np.ones((len(rows), T), bool),
    }
    if config.data.mask_documents:
        batch["segment_ids"] = np.tile(ids_T + 1, (len(rows), 1))
    return batch


def compiled(config: RunConfig, *, documents: int = 1, options: str = "", state: Any = None) -> Run:
    """The step as a run builds it, compiled, with its first state and one batch on the devices.

    documents: of a row. options: XLA's, `k=v,k=v`. state: of an earlier Run of the same model and
    optimizer, which this one takes over.
    """
    import jax

    from llamajax import backends, sharding
    from llamajax.models.machine_choices import (
        check_mesh,
        resolve_attention,
        resolve_compiler_options,
        resolve_compute,
        with_loss_chunk,
    )
    from llamajax.training.programs import lower_update
    from llamajax.training.state import StateSpec

    if options:
        backend = dataclasses.replace(config.backend, compiler_options=options)
        config = dataclasses.replace(config, backend=backend)
    machine = backends.start(config.backend)
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    check_mesh(config, mesh)
    config = with_loss_chunk(config, machine.platform, mesh.shape)
    attention = resolve_attention(config, machine, mesh)
    compute = resolve_compute(config, mesh, attention.impl)
    chosen = resolve_compiler_options(config, machine, mesh)
    spec = StateSpec.of(config, mesh)
    if state is None:
        state = jax.block_until_ready(spec.init(config.train.seed))
    batch = sharding.put_batch(random_batch(config, documents=documents), mesh)
    start = time.perf_counter()
    update = chosen.compile(lower_update(config, mesh, compute, spec.optimizer, state))
    compile_s = time.perf_counter() - start
    return Run(config, machine, mesh, attention, chosen, compile_s, update, state, batch)


def check_fits(run: Run) -> None:
    """Raise DoesNotFit before a program runs that its compiler says is too large."""
    import jax

    from llamajax.backends import program_bytes

    needed = program_bytes(run.update)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if needed and limit and needed > limit:
        raise DoesNotFit(
            f"the step takes {needed / 2**30:.1f} GiB of a device, which has "
            f"{limit / 2**30:.1f}: lower --batch, or keep less with --remat"
        )


def measure(run: Run, *, steps: int) -> dict[str, Any]:
    """Time `steps` waited steps and a window of as many; all that is known of them, as JSON."""
    import jax

    losses = [run.step() for _ in range(WARM_UP)]
    waited = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run.step())
        waited.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(steps):
        metrics = run.dispatch()
    jax.block_until_ready(run.state)
    window_s = (time.perf_counter() - start) / steps
    losses.append(float(metrics["loss"]))
    return facts(run) | speed(run, window_s) | {
        "steps": steps,
        "waited_step_s": statistics.median(waited),
        "waited_least_s": min(waited),
        "waited_most_s": max(waited),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }  # fmt: skip


def facts(run: Run) -> dict[str, Any]:
    """What is known of a compiled step before it runs."""
    import jax

    from llamajax import backends, sharding
    from llamajax.backends.devices import find
    from llamajax.models.counts import num_parameters
    from llamajax.planning.roofline import predict

    c, machine, memory = run.config, run.machine, run.update.memory_analysis()
    device, predicted = find(machine.device_kind), None
    if device is not None and run.mesh.size == 1:  # with more, links have a part in it
        predicted = predict(c, run.mesh.shape, device, {}, attention=run.attention.impl)
    return {
        "date": str(datetime.date.today()),
        "versions": machine.versions,
        "platform": machine.platform,
        "device_kind": machine.device_kind,
        "num_devices": machine.num_devices,
        "mesh": sharding.describe(run.mesh),
        "model": c.model.name,
        "parameters": num_parameters(c.model),
        "batch": c.data.global_batch_size,
        "seq_len": c.data.seq_len,
        "mask_documents": c.data.mask_documents,
        "attention": run.attention.impl,
        "attention_reason": run.attention.reason,
        "compiler_options": dict(run.options.values),
        "refused_compiler_options": list(run.options.refused),
        "moment_dtype": c.optim.moment_dtype,
        **{
            key: getattr(c.train, key)
            for key in ("dtype", "remat", "remat_keep", "accumulation_steps", "loss_chunk_tokens")
        },
        "compile_s": run.compile_s,
        "program_bytes": backends.program_bytes(run.update),
        "temporary_bytes": memory and memory.temp_size_in_bytes,
        "limit_bytes": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        "predicted_step_s": predicted and predicted.step_time_s,
    }


def speed(run: Run, step_s: float) -> dict[str, Any]:
    """Speed, both MFUs (null where the peak is unknown) and memory of a step of so many seconds."""
    from llamajax import backends
    from llamajax.models.counts import flops_per_token

    c, machine = run.config, run.machine
    tokens = c.data.global_batch_size * c.data.seq_len
    peak = backends.peak_flops(machine.device_kind, c.train.dtype)
    found = {"step_s": step_s, "tokens_per_s": tokens / step_s}
    for name, causal in (("full", False), ("causal", True)):
        flops = flops_per_token(c.model, c.data.seq_len, causal=causal)
        reached = tokens / step_s * flops / machine.num_devices
        found[f"flops_per_s_{name}"] = reached  # of a device
        found[f"mfu_{name}"] = reached / peak[0] if peak else None
    memory = max(backends.memory_in_use().get("peak_memory_bytes", []), default=None)
    found["peak_bytes"] = memory  # of a device since the process began; None: unknown
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def seconds_alive() -> float | None:
    """Time since this process was started; None where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot, proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def table(found: dict[str, Any]) -> str:
    """What `measure` found, as the rows of one Markdown table."""
    each = found["tokens_per_s"] / found["num_devices"]
    mfu = {}
    for name in ("full", "causal"):
        share = found[f"mfu_{name}"]
        mfu[name] = "null, peak unknown" if share is None else f"{100 * share:.1f} %"
        mfu[name] += f" ({found[f'flops_per_s_{name}'] / 1e12:.3g} TFLOP/s a device)"
    memory, kind = found["peak_bytes"], "device statistics"
    if memory is None:
        memory, kind = found["peak_rss_bytes"], "process peak RSS"
    tokens, versions = found["batch"] * found["seq_len"], found["versions"]
    kept = "".join(f", keeping {name}" for name in found["remat_keep"])
    rows = {
        "model": f"{found['model']}, {found['parameters']:,} parameters",
        "machine": f"{found['platform']}, {found['device_kind']}, {found['mesh']}",
        "date, versions": f"{found['date']}, jax {versions['jax']}, flax {versions['flax']}",
        "batch": f"{found['batch']} x {found['seq_len']} = {tokens:,} tokens, "
        f"{found['accumulation_steps']} microbatch(es), {found['documents']} document(s) a row",
        "compute": f"{found['dtype']}, attention {found['attention']}, remat {found['remat']}"
        f"{kept}, loss in chunks of {found['loss_chunk_tokens']}, "
        f"first moment {found['moment_dtype']}",
        "tokens/s": f"{found['tokens_per_s']:,.0f} ({each:,.0f} a device)",
        "step time": f"{found['step_s'] * 1e3:.1f} ms, of {found['steps']} steps without waiting",
        "step time, waited for": f"median {found['waited_step_s'] * 1e3:.1f} ms, "
        f"min {found['waited_least_s'] * 1e3:.1f}, max {found['waited_most_s'] * 1e3:.1f}, "
        f"of {found['steps']} steps",
        "MFU, full attention matrix": mfu["full"],
        "MFU, causal half of it": mfu["causal"],
        "peak memory": f"{memory / 2**20:,.0f} MiB ({kind})",
        "start-up": f"{found['start_up_s']:.1f} s from process start to first step done"
        if found["start_up_s"]
        else "unknown: no /proc",
        "of it compiling the step": f"{found['compile_s']:.1f} s",
    }
    if options := found["compiler_options"].items():
        rows["compiler options"] = ", ".join(f"{name}={value}" for name, value in options)
    if found["predicted_step_s"]:
        rows["predicted step time"] = f"{found['predicted_step_s'] * 1e3:.1f} ms"
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
    parser.add_argument("--dtype", choices=get_args(TrainDtype), default="float32")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--remat", choices=get_args(Remat), default="dots")
    parser.add_argument("--remat_keep", default="", help="tensors of a block to keep, a,b")
    parser.add_argument("--attention", help=describe(AttentionImpl), default="auto")
    parser.add_argument("--accumulation", type=int, default=1, help="microbatches a step")
    parser.add_argument("--loss_chunk_tokens", type=int, help="none: as train chooses")
    parser.add_argument("--moment_dtype", choices=get_args(ComputeDtype), default="float32")
    parser.add_argument(
        "--documents", type=int, default=1, help="documents a row; 0: no document masks"
    )
    parser.add_argument("--compiler_options", default="", help="of XLA for the step, k=v,k=v")
    parser.add_argument("--mesh", help="AXIS=SIZE,...; default: all devices along fsdp")
    parser.add_argument("--backend", help="JAX platform; none: what JAX finds")
    parser.add_argument("--plugin", help="bare PJRT plugin library that serves --backend")
    parser.add_argument("--options", help="options of that plugin, k=v,k=v")
    parser.add_argument("--num_cpu_devices", type=int, help="virtual devices of the cpu backend")
    parser.add_argument("--device_table", help="TOML file with peaks, as backend.device_table")
    parser.add_argument("--json", help="file to write everything measured to, as one object")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    return parser


def measured(flags: argparse.Namespace, *, state: Any = None) -> tuple[dict[str, Any], Run]:
    """What the step that the flags describe takes, and the Run, whose state can be used again."""
    from llamajax.models.machine_choices import float8_warnings

    config = run_config(flags)
    run = compiled(config, documents=flags.documents, options=flags.compiler_options, state=state)
    warnings = [*run.attention.warnings(), *run.options.warnings()]
    for line in warnings + float8_warnings(config, run.machine.device_kind):
        say(f"warning: {line}")
    check_fits(run)
    run.step()
    found = {"start_up_s": seconds_alive(), "documents": flags.documents}
    return found | measure(run, steps=flags.steps), run


def main(argv: list[str]) -> None:
    """Measure and print."""
    flags = arguments().parse_args(argv)
    if flags.steps < 1:
        raise UserError(f"--steps={flags.steps}: at least one step has to be timed")
    if flags.documents < 0 or flags.documents > flags.seq_len:
        raise UserError(f"--documents={flags.documents}: 0 to --seq_len={flags.seq_len}")
    if flags.json and (problem := target_problem(flags.json)):
        raise UserError(f"--json={flags.json}: {problem}")
    found, run = measured(flags)
    if run.machine.is_primary:
        if flags.json:
            write_file(Path(flags.json), json.dumps(found, indent=1) + "\n")
        print(table(found))


if __name__ == "__main__":
    with_huge_pages()  # as llamajax.train does
    run_verb(main)
