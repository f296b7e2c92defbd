"""Compares predicted speeds with published training runs that no figure of ours was set by.

    python benchmarks/published.py              # by the formulas of a search, in seconds
    python benchmarks/published.py --compile    # by the compiled programs, as `plan` does it

Runs by which the efficiencies of the device table were chosen are left out (see
benchmarks/results/2026-11-25-plans.md). Other systems' recomputation and batches are not always
published: `remat`, the mesh and the rows of a device here are the nearest that is known or likely.
Needs JAX's CUDA plugin and libtpu (extras plan-gpu, plan-tpu), and neither GPU nor TPU.
"""

import dataclasses
import datetime

import jax
from train_step import OPTIM  # the script beside this one

from llamajax.backends import absent_devices
from llamajax.config import (
    BackendConfig,
    Flags,
    RunConfig,
    find_preset,
    freeze,
    key,
    parse_command_line,
)
from llamajax.planning.planner import make_plan
from llamajax.planning.search import estimate
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True)
class Published:
    """A published run. tokens_per_s: of one device to JAX; rows: on each, at a time."""

    system: str
    preset: str
    devices: str
    seq_len: int
    mesh: dict[str, int]
    rows: int
    remat: str
    tokens_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFlags(Flags):
    """Flags of this script."""

    compile: bool = key("predict by the compiled programs", default=False)
    only: str = key("runs whose devices begin so", default="")


# Figures: each system's own tables and issues, autumn 2026. A TPU7x chip is two devices.
RUNS = (
    Published("LLM Foundry", "llama2-7b", "h100:8", 4096, {"fsdp": 8}, 4, "full", 8_611),
    Published("KempnerForge", "llama2-7b", "h200:1", 4096, {}, 4, "full", 10_471),
    Published("torchtitan", "llama3-8b", "h100:8", 8192, {"fsdp": 8}, 1, "save_attention", 6_667),
    Published(
        "MaxText", "llama3-70b", "h200:32x8", 8192, {"data": 2, "fsdp": 128}, 2, "save_qkv", 1_056
    ),
    Published("torchtitan, 500 W", "llama3-70b", "h100:32x8", 8192, {"fsdp": 256}, 2, "full", 652),
    Published("MaxText", "llama3-8b", "v6e:16x16", 8192, {"fsdp": 256}, 2, "full", 7_207),
    Published("MaxText", "llama3-70b", "tpu7x:4x4x4", 8192, {"fsdp": 128}, 2, "save_qkv", 1_343.5),
)


def run_config(run: Published, devices: int) -> RunConfig:
    """Return the run as ours, with AdamW and float32 weights and moments."""
    return freeze(
        {
            "model": dataclasses.asdict(find_preset(run.preset)),
            "mesh": run.mesh,
            "data": {"path": "random", "seq_len": run.seq_len, "seed": 0,
                     "global_batch_size": run.rows * devices},
            "train": {"steps": 1, "seed": 0, "dtype": "bfloat16", "remat": run.remat},
            "optim": OPTIM,
        },
        source=f"{run.system}, {run.preset}",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Print a row a run."""
    flags = parse_command_line(argv, PublishedFlags, verb="benchmarks/published.py", doc=__doc__)
    how = "compiled programs" if flags.compile else "formulas"
    print(f"{datetime.date.today()}, jax {jax.__version__}, by {how}\n")
    print("| run | devices | mesh, rows, remat | predicted | published | error |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for run in RUNS:
        if not run.devices.startswith(flags.only):
            continue
        target = absent_devices(run.devices, BackendConfig())
        config = run_config(run, len(target.devices))
        if flags.compile:
            found = make_plan(config, target, cache=None).prediction
        else:
            found = estimate(config, target).prediction
        mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.items()) or "1 device"
        row = f"| {run.system}, {run.preset}, {run.seq_len} | {run.devices} | {mesh}, {run.rows}, "
        if found is None:
            print(f"{row}{run.remat} | none | {run.tokens_per_s:,.0f} | |", flush=True)
            continue
        each = found.tokens_per_s / len(target.devices)
        error = each / run.tokens_per_s - 1
        print(f"{row}{run.remat} | {each:,.0f} | {run.tokens_per_s:,.0f} | {error:+.0%} |",
              flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    run_verb(main)
