"""What a run prints when it starts and ends, or would print; what `run.json` says of it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from llamajax import backends, sharding
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import Checkpointer
from llamajax.config import RunConfig
from llamajax.config.saved_config import origins
from llamajax.errors import ExitCode
from llamajax.evaluation.continuations import ContinuationRows
from llamajax.evaluation.evaluation_inputs import samples_problem
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.lora import num_adapter_parameters
from llamajax.models.machine_choices import float8_warnings
from llamajax.models.memory import held_parts, host_bytes
from llamajax.monitoring.row_format import format_count, format_size
from llamajax.training.initial_state import check_stored
from llamajax.training.programs import RunPrograms
from llamajax.training.run_start import Start, first_start
from llamajax.training.setup import Setup, set_up
from llamajax.training.stage_data import data_warnings, stage_data
from llamajax.training.workdir import Run, previous_checkpoint, read_run

_WIDTH = 44  # of values in a dry run


def run_header(setup: Setup, start: Start) -> Iterator[str]:
    """Yield the lines that say what runs where, and from which step."""
    stages = stage_data(setup, start.position, start.step)
    c, m = setup.config, setup.machine
    tasks = setup.evaluated.tasks
    if not setup.evaluated.sets and tasks is None:
        yield "warning: the data has no validation split: no evaluation"
    if problem := samples_problem(c, setup.mesh.shape["stage"]):
        yield f"warning: train.sample_prompts: {problem}"
    odd = [*data_warnings(setup, stages), *memory_warnings(setup)]
    for line in [*odd, *(tasks.warnings() if tasks else ())]:
        yield f"warning: {line}"
    if problem := tasks_problem(setup):
        yield f"warning: train.tasks: {problem}"
    if c.train.name:
        yield f"run      {c.train.name}"
    trained = f", {format_count(num_trained(c))} trained" if c.lora.rank else ""
    parameters = format_count(num_parameters(c.model))
    yield f"model    {c.model.name or 'custom'}, {parameters} parameters{trained}"
    yield f"machine  {m.platform}, {m.device_kind}; mesh {sharding.describe(setup.mesh)}"
    yield from backends.profile_lines(m)
    warnings = [*setup.attention.warnings(), *setup.compiler_options.warnings()]
    for line in warnings + float8_warnings(c, m.device_kind):
        yield f"warning: {line}"
    for line in sharding.device_order_table(setup.mesh):
        yield f"layout   {line}"
    yield f"compute  {c.train.dtype}, attention {setup.compute.attention}, remat {c.train.remat}"
    if peak := backends.peak_flops(m.device_kind, c.train.dtype):
        yield f"peak     {peak[0] / 1e12:g} TFLOP/s a device ({peak[1]})"
    else:
        yield f"peak     unknown for {m.device_kind!r}: no MFU"
    for each in stages:
        yield from each.lines()
    for name, held_out in setup.evaluated.named.items():
        (source,) = held_out.sources
        tokens = format_count(source.num_tokens)
        yield f"held out {name}: {source.split} split of {source.path}, {tokens} tokens"
    for name, questions in tasks.questions.items() if tasks else ():
        yield f"task     {name}: {len(questions)} questions"
    origin = c.train.init_from or "the beginning"
    where = f"continuing from step {start.step}" if start.step else f"from {origin}"
    yield f"steps    {c.train.steps}, {where}"


def tasks_problem(setup: Setup) -> str | None:
    """Return what it costs that choices of tasks do not share rows; None where they do."""
    tasks, data = setup.evaluated.tasks, setup.config.data
    if tasks is None or data.mask_documents:
        return None
    count, packed = len(tasks.encoded), ContinuationRows(tasks.encoded, data.seq_len).num_rows
    return (
        f"with data.mask_documents=false each of {count} choices has a row of its own, so that an "
        f"evaluation computes {count * data.seq_len:,} tokens; `llamajax evaluate --tasks` "
        f"computes about {packed * data.seq_len:,}"
    )


def memory_warnings(setup: Setup) -> Iterator[str]:
    """Yield a warning where this host cannot hold what the run needs of it, by formula."""
    needed = max(
        host_bytes(
            stage.config,
            dict(setup.mesh.shape),
            num_devices=jax.local_device_count(),
            is_host=platform_facts(setup.machine.platform).is_host,
        )
        for _, stage in setup.stages
    )
    there = backends.host_memory_bytes()
    if there is not None and needed > there:
        yield (
            f"the run needs about {format_size(needed)} of this host's memory, by formula, and "
            f"there are {format_size(there)}: it may be killed. Choose a smaller model, batch or "
            "sequence, a train.remat that keeps less, or more hosts (--dry_run lists the parts)"
        )


def num_trained(config: RunConfig) -> int:
    """Return the number of weights that updates change."""
    if config.lora.rank:
        return num_adapter_parameters(config.model, config.lora)
    return num_parameters(config.model)


def mfu(setup: Setup, tokens_per_s: float) -> dict[str, float | None]:
    """Return both MFUs of a stage at a speed; null where the device's peak is not known."""
    config, machine = setup.config, setup.machine
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)
    total = peak and peak[0] * machine.num_devices
    flops = {
        name: flops_per_token(
            config.model, config.data.seq_len, causal=causal, frozen=config.lora.rank > 0
        )
        for name, causal in (("mfu_full", False), ("mfu_causal", True))
    }
    return {name: total and tokens_per_s * each / total for name, each in flops.items()}


def run_facts(run: Run, start: Start, programs: RunPrograms) -> dict[str, Any]:
    """Return what `run.json` says of a run, as it is from `start` on."""
    setup, machine, config = run.setup, run.setup.machine, run.config
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)
    first, own = programs.at(start.step + 1), setup.evaluated.own
    donated = backends.donated_bytes(first.update)
    float8 = "in 8 bits" if backends.multiplies_float8(machine.device_kind) else "rounded only"
    stages = stage_data(setup, start.position, start.step)
    packed = next((each for each in stages if each.packing_facts), stages[0])
    facts = dataclasses.asdict(machine)
    del facts["process_id"]
    return facts | {
        "profile": backends.machine_profile(machine),
        "mesh": dict(setup.mesh.shape),
        "attention": setup.attention.impl,
        "attention_reason": setup.attention.reason,
        "compiler_options": dict(setup.compiler_options.values),
        "num_parameters": num_parameters(config.model),
        "num_trained_parameters": num_trained(config),
        "program": first.digest,
        "program_bytes": backends.program_bytes(first.update),
        "donated_bytes": donated and donated[0],
        "reused_bytes": donated and donated[1],
        "peak_flops": peak[0] if peak else None,
        "peak_source": peak[1] if peak else None,
        "float8_products": None if setup.compute.float8 is None else float8,
        "lost_features": backends.lost_features(machine.platform),
        "untested_versions": backends.untested_versions(),
        "samples_problem": samples_problem(config, setup.mesh.shape["stage"]),
        "tasks_problem": tasks_problem(setup),
        "eval_loss_of": setup.evaluated.described,
        "packing": packed.packing_facts,
        "packing_problem": packed.packing_problem,
        "unigram_entropy": own.unigram_loss if own else None,
        **programs.facts(step=start.first_compiled),
        "origin": start.recorded["origin"],
        "rope_scaling_changed": start.recorded["rope_scaling_changed"],
        "workdir_locked": run.is_locked,
    }


def run_summary(workdir: Path, checkpointer: Checkpointer, code: int) -> str:
    """Return how a run ended and where its files are."""
    stopped = "stopped; rerun the same command to continue"
    words = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: stopped}
    word = words.get(code, "ended for the reason above")
    report = workdir / "report.html"
    return f"{word}. Checkpoint {previous_checkpoint(checkpointer)}, report {report}"


def dry_run(config: RunConfig, *, workdir: Path, overrides: Mapping[str, str]) -> Iterator[str]:
    """Yield what `train --dry_run` prints: every value with its origin, then the run's header.

    Nothing is written. Raises UserError where `train` would. overrides: of the command line, by
    path.
    """
    for path, value, origin in origins(config, overrides):
        yield f"{f'{path} = {value}':<{_WIDTH}}  # {origin}"
    yield ""
    setup = set_up(config, keep_programs=False)
    with read_run(setup, workdir) as run:
        start, _ = first_start(run)
    if start.checkpoint is not None:
        check_stored(setup.at(start.step), start.checkpoint)
    yield from run_header(setup, start)
    yield f"kernels  attention {setup.attention.impl}: {setup.attention.reason}"
    options = setup.compiler_options.values.items()
    yield f"compiler {', '.join(f'{name}={value}' for name, value in options) or 'no options'}"
    yield _memory(setup)


def _memory(setup: Setup) -> str:
    sizes = dict(setup.mesh.shape)
    parts = max(
        (held_parts(stage.config, sizes) for _, stage in setup.stages),
        key=lambda p: sum(p.values()),
    )
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
    total = format_size(sum(parts.values()))
    return f"memory   {total} a device at least, by formula: {listed}; `llamajax plan` has more"
