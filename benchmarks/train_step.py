"""Prints how fast the training step is here: speed, both MFUs, memory and start-up, as one table.

    python benchmarks/train_step.py --preset=bench-32m --batch=4 --seq_len=512 --dtype=float32
    python benchmarks/train_step.py --preset=tiny --batch=8 --seq_len=64 \
        --backend=cpu --num_cpu_devices=8 --mesh=fsdp=4,tensor=2

The step is that of `llamajax.train`: float32 weights, AdamW with clipping, document masks, donated
state. Tokens are random, drawn once and reused. Steps are timed twice: each waited for before the
next begins, and a window of them dispatched without waiting, as a run does it. Speed and MFU are
those of the window. Runs on whatever backend JAX finds, with jax, flax, optax and orbax alone.
"""

import dataclasses
import datetime
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamajax.backends import with_huge_pages
from llamajax.config import (
    MachineFlags,
    RunConfig,
    find_preset,
    freeze,
    key,
    mesh_config,
    parse_command_line,
)
from llamajax.config.forms import check_output
from llamajax.config.schema import AttentionImpl, ComputeDtype, Remat, TrainDtype
from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.verbs import run_verb

if TYPE_CHECKING:  # JAX takes seconds to import: mistakes are answered without it
    from llamajax.planning.compilation import PlannedStep

WARM_UP = 2  # steps after the first that are not counted
OPTIM = {
    "learning_rate": 3e-4, "warmup_steps": 0, "schedule": "constant", "final_learning_rate": 3e-4,
    "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlags(MachineFlags):
    """Flags of this script."""

    preset: str = key("a model of llamajax.config.PRESETS", default="bench-32m")
    batch: int = key("samples a step, over all devices", default=4, at_least=1)
    seq_len: int = key("tokens a sample", default=512, at_least=1)
    dtype: TrainDtype = key("of matrix products", default="float32")
    steps: int = key("steps that are timed", default=20, at_least=1)
    remat: Remat = key("what a block keeps for the backward pass", default="dots")
    remat_keep: tuple[str, ...] = key("further tensors of a block to keep, a,b", default=())
    attention: AttentionImpl = key("as train.attention", default="auto")
    accumulation: int = key("microbatches a step", default=1, at_least=1)
    loss_chunk_tokens: int | None = key("none: as train chooses", default=None)
    moment_dtype: ComputeDtype = key("of the first moment", default="float32")
    documents: int = key("documents a row; 0: no document masks", default=1, at_least=0)
    compiler_options: str | None = key("of XLA for the step, k=v,k=v", default=None)
    device_table: str | None = key(
        "TOML file with peaks, as backend.device_table", default=None, is_path=True
    )
    json: str | None = key(
        "file to write everything measured to", default=None, is_path=True, check=check_output
    )
    seed: int = key("of weights and tokens", default=0)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.documents > self.seq_len:
            yield f"--documents={self.documents}: 0 to --seq_len={self.seq_len}"

    @classmethod
    def parse(cls, argv: list[str]) -> "StepFlags":
        """Read a command line. UserError for mistakes."""
        return parse_command_line(argv, cls, verb="benchmarks/train_step.py", doc=__doc__)


class DoesNotFit(UserError):
    """A compiled step that takes more memory than the device has."""


@dataclasses.dataclass
class Run:
    """A compiled step with everything it needs; `step()` is one update, waited for."""

    machine: Any
    planned: "PlannedStep"  # the step before it is compiled
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


def run_config(flags: StepFlags) -> RunConfig:
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
            "remat_keep": flags.remat_keep,
            "attention": flags.attention,
            "accumulation_steps": flags.accumulation,
            "loss_chunk_tokens": flags.loss_chunk_tokens,
        },
        "optim": OPTIM | {"moment_dtype": flags.moment_dtype},
        "backend": dataclasses.asdict(flags.backend_config)
        | {"device_table": flags.device_table, "compiler_options": flags.compiler_options},
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


def compiled(config: RunConfig, *, documents: int = 1, state: Any = None) -> Run:
    """The step as a run builds it, compiled, with its first state and one batch on the devices.

    documents: of a row. state: of an earlier Run of the same model and optimizer, which this one
    takes over.
    """
    import jax

    from llamajax import backends, sharding
    from llamajax.planning.compilation import abstract_step, lowered_step, present_devices

    machine = backends.start(config.backend)
    planned = abstract_step(config, present_devices(machine))
    if state is None:
        state = jax.block_until_ready(planned.spec.init(config.train.seed))
    batch = sharding.put_batch(random_batch(config, documents=documents), planned.mesh)
    start = time.perf_counter()
    lowered = lowered_step(dataclasses.replace(planned, state=state))
    update = planned.compiler_options.compile(lowered)
    return Run(machine, planned, time.perf_counter() - start, update, state, batch)


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
    from llamajax.models.counts import num_parameters
    from llamajax.planning.roofline import predict

    machine, planned, memory = run.machine, run.planned, run.update.memory_analysis()
    c, mesh, attention, options = (
        planned.config, planned.mesh, planned.attention, planned.compiler_options
    )  # fmt: skip
    device, predicted = planned.target.entry, None
    if device is not None and mesh.size == 1:  # with more, links have a part in it
        predicted = predict(c, mesh.shape, device, {}, attention=attention.impl)
    return {
        "date": str(datetime.date.today()),
        "versions": machine.versions,
        "platform": machine.platform,
        "device_kind": machine.device_kind,
        "num_devices": machine.num_devices,
        "mesh": sharding.describe(mesh),
        "model": c.model.name,
        "parameters": num_parameters(c.model),
        "batch": c.data.global_batch_size,
        "seq_len": c.data.seq_len,
        "mask_documents": c.data.mask_documents,
        "attention": attention.impl,
        "attention_reason": attention.reason,
        "compiler_options": dict(options.values),
        "refused_compiler_options": list(options.refused),
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

    c, machine = run.planned.config, run.machine
    tokens = c.data.global_batch_size * c.data.seq_len
    peak = backends.peak_flops(machine.device_kind, c.train.dtype)
    found = {"step_s": step_s, "tokens_per_s": tokens / step_s}
    for name, causal in (("full", False), ("causal", True)):
        flops = flops_per_token(c.model, c.data.seq_len, causal=causal)
        reached = tokens / step_s * flops / machine.num_devices
        found[f"flops_per_s_{name}"] = reached  # of a device
        found[f"mfu_{name}"] = reached / peak[0] if peak else None
    return found | memory_peaks()


def memory_peaks() -> dict[str, int | None]:
    """Peaks since the process began: of a device (null where unknown), and of the process."""
    from llamajax import backends

    return {
        "peak_bytes": max(backends.memory_in_use().get("peak_memory_bytes", []), default=None),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peak_memory(peaks: dict[str, Any]) -> str:
    """Memory in words, from what `memory_peaks` found."""
    if peaks["peak_bytes"] is not None:
        return f"{peaks['peak_bytes'] / 2**20:,.0f} MiB (device statistics)"
    return f"{peaks['peak_rss_bytes'] / 2**20:,.0f} MiB (process peak RSS)"


def seconds_alive() -> float | None:
    """Time since this process was started; None where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot, proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def two_columns(rows: dict[str, str]) -> str:
    """One Markdown table of names and values."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def table(found: dict[str, Any]) -> str:
    """What `measure` found, as one Markdown table."""
    each = found["tokens_per_s"] / found["num_devices"]
    mfu = {}
    for name in ("full", "causal"):
        share = found[f"mfu_{name}"]
        mfu[name] = "null, peak unknown" if share is None else f"{100 * share:.1f} %"
        mfu[name] += f" ({found[f'flops_per_s_{name}'] / 1e12:.3g} TFLOP/s a device)"
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
        "peak memory": peak_memory(found),
        "start-up": f"{found['start_up_s']:.1f} s from process start to first step done"
        if found["start_up_s"]
        else "unknown: no /proc",
        "of it compiling the step": f"{found['compile_s']:.1f} s",
    }
    if options := found["compiler_options"].items():
        rows["compiler options"] = ", ".join(f"{name}={value}" for name, value in options)
    if found["predicted_step_s"]:
        rows["predicted step time"] = f"{found['predicted_step_s'] * 1e3:.1f} ms"
    return two_columns(rows)


def measured(flags: StepFlags, *, state: Any = None) -> tuple[dict[str, Any], Run]:
    """What the step that the flags describe takes, and the Run, whose state can be used again."""
    from llamajax.models.machine_choices import float8_warnings

    config = run_config(flags)
    run = compiled(config, documents=flags.documents, state=state)
    warnings = [*run.planned.attention.warnings(), *run.planned.compiler_options.warnings()]
    for line in warnings + float8_warnings(config, run.machine.device_kind):
        say(f"warning: {line}")
    check_fits(run)
    run.step()
    found = {"start_up_s": seconds_alive(), "documents": flags.documents}
    return found | measure(run, steps=flags.steps), run


def main(argv: list[str]) -> None:
    """Measure and print."""
    flags = StepFlags.parse(argv)
    found, run = measured(flags)
    if run.machine.is_primary:
        if flags.json:
            write_file(Path(flags.json), json.dumps(found, indent=1) + "\n")
        print(table(found))


if __name__ == "__main__":
    with_huge_pages()  # as llamajax.train does
    run_verb(main)
