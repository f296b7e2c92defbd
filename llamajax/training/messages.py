"""What a run prints when it starts and ends, and writes about itself to `run.json`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from llamajax import backends, data, sharding
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import Checkpointer
from llamajax.config import RunConfig
from llamajax.data.packing import WINDOWS
from llamajax.errors import ExitCode
from llamajax.evaluation.continuations import ContinuationRows
from llamajax.evaluation.evaluation_inputs import samples_problem
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.lora import num_adapter_parameters
from llamajax.models.machine_choices import float8_warnings
from llamajax.models.memory import host_bytes
from llamajax.monitoring.row_format import format_count, format_size
from llamajax.training.programs import Programs
from llamajax.training.setup import Setup
from llamajax.training.workdir import previous_checkpoint

_MANY_PASSES = 100  # over the same text
_FULL = 0.9  # of the positions hold tokens


def run_header(setup: Setup, position: "data.Position", start: int) -> Iterator[str]:
    """Yield the lines that say what runs where, and from which step.

    position: in the data, from step `start` on.
    """
    packings = stage_packings(setup, position, start)
    c, m = setup.config, setup.machine
    tasks = setup.evaluated.tasks
    if not setup.evaluated.sets and tasks is None:
        yield "warning: the data has no validation split: no evaluation"
    if problem := samples_problem(c, setup.mesh.shape["stage"]):
        yield f"warning: train.sample_prompts: {problem}"
    for line in data_warnings(setup, packings) + memory_warnings(setup):
        yield f"warning: {line}"
    for line in tasks.warnings() if tasks else ():
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
    for number, (first_step, stage) in enumerate(setup.stages):
        where = f"stage {number}  from step {first_step} on: " if number else "data     "
        data, rope = stage.config.data, stage.config.model.rope_scaling
        shape = f"{data.global_batch_size} x {data.seq_len}"
        tokens = format_count(data.global_batch_size * data.seq_len)
        is_scaled = rope != c.model.rope_scaling
        scaled = f"; rope_scaling {rope.type} x {rope.factor:g}" if is_scaled else ""
        yield f"{where}{data.path}; {shape} = {tokens} tokens a step{scaled}"
        yield f"epochs   {_epochs(setup, number, packings[number])}"
        yield from _packing(stage, packings[number])
    for name, held_out in setup.evaluated.named.items():
        (source,) = held_out.sources
        tokens = format_count(source.num_tokens)
        yield f"held out {name}: {source.split} split of {source.path}, {tokens} tokens"
    for name, questions in tasks.questions.items() if tasks else ():
        yield f"task     {name}: {len(questions)} questions"
    origin = c.train.init_from or "the beginning"
    where = f"continuing from step {start}" if start else f"from {origin}"
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


def _float8_products(setup: Setup) -> str | None:
    if setup.compute.float8 is None:
        return None
    known = backends.multiplies_float8(setup.machine.device_kind)
    return "in 8 bits" if known else "rounded only"


def memory_warnings(setup: Setup) -> list[str]:
    """Return a warning where this host cannot hold what the run needs of it, by formula."""
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
    if there is None or needed <= there:
        return []
    return [
        f"the run needs about {format_size(needed)} of this host's memory, by formula, and there "
        f"are {format_size(there)}: it may be killed. Choose a smaller model, batch or sequence, a "
        "train.remat that keeps less, or more hosts (--dry_run lists the parts)"
    ]


def _tokens_read(setup: Setup, number: int) -> tuple[int, int]:
    """Return the steps of a stage and the tokens that it reads."""
    ends = [*setup.borders, setup.config.train.steps]
    steps = ends[number] - setup.stages[number][0]
    return steps, steps * setup.tokens_of(ends[number])


def _stream_read(setup: Setup, number: int, packing: str) -> list[float]:
    """Return how many tokens of each source's stream a stage reads, padding not included."""
    stage, read = setup.stages[number][1], _tokens_read(setup, number)[1]
    length, mixture = stage.config.data.seq_len, stage.mixture
    samples = mixture.samples(length, packing)
    shares = [weight / sum(mixture.weights) for weight in mixture.weights]
    return [s.tokens(read / length * share) for s, share in zip(samples, shares, strict=True)]


def _epochs(setup: Setup, number: int, packing: str) -> str:
    """Describe how often a stage reads each of its sources."""
    mixture, (steps, read) = setup.stages[number][1].mixture, _tokens_read(setup, number)
    epochs = ", ".join(
        f"{tokens / source.num_tokens:.3g} of {source.path} "
        f"({format_count(source.num_tokens)} tokens)"
        for source, tokens in zip(
            mixture.sources, _stream_read(setup, number, packing), strict=True
        )
    )
    return f"{epochs}; {format_count(read)} tokens in {steps} steps"


def stage_packings(setup: Setup, position: "data.Position", start: int) -> list[str]:
    """Return how each stage packs its instructions; of one that is over, how it did last."""
    ends = [*setup.borders, setup.config.train.steps]
    steps = [
        max(first, min(start, end - 1)) for (first, _), end in zip(setup.stages, ends, strict=True)
    ]
    return [position.segment(step).packing for step in steps]


def packing_problem(stage: Setup, packing: str) -> str | None:
    """Return that much of the rows of whole examples is padding; None where it is little."""
    mixture, length = stage.mixture, stage.config.data.seq_len
    efficiency = mixture.packing_facts(length, packing).get("efficiency", 1.0)
    if efficiency >= _FULL:
        return None
    manifests = [source.stats.get("packing", {}) for source in mixture.sources if source.masked]
    shares = {n: min(m.get(n, {}).get("efficiency", 0) for m in manifests) for n in manifests[0]}
    fuller = [n for n, share in shares.items() if int(n) > length and share >= _FULL]
    larger = f"data.seq_len = {fuller[0]} ({shares[fuller[0]]:.1%}) or " if fuller else ""
    return (
        f"only {efficiency:.1%} of the positions hold tokens, the others are padding that costs as "
        f"much: few examples fit together into data.seq_len = {length}. Choose {larger}"
        "data.packing=windows, which has no padding and cuts examples"
    )


def _packing(stage: Setup, packing: str) -> Iterator[str]:
    """Yield how the instructions of a stage become samples; nothing where it has none."""
    length = stage.config.data.seq_len
    facts = stage.mixture.packing_facts(length, packing)
    if not facts:
        return
    cut = f"{facts['cut_examples_share']:.1%} of the examples"
    cut += f", with {facts['cut_loss_share']:.1%} of the tokens that carry loss,"
    if packing == WINDOWS:
        yield f"packing  windows of one stream; {cut} are cut (data.packing=examples: the longest)"
        return
    yield f"packing  whole examples; {facts['efficiency']:.1%} of the positions hold tokens"
    if facts["cut_examples_share"]:
        yield (
            f"warning: {cut} are longer than data.seq_len = {length} and cut: a part does not see "
            "those before it, and parts without such tokens are left out"
        )
    if problem := packing_problem(stage, packing):
        yield f"warning: {problem}"


def packing_record(setup: Setup, packings: Sequence[str]) -> dict[str, Any]:
    """Return what `run.json` says of the packing, of the first stage that has instructions."""
    for (_, stage), packing in zip(setup.stages, packings, strict=True):
        if facts := stage.mixture.packing_facts(stage.config.data.seq_len, packing):
            return {"packing": facts, "packing_problem": packing_problem(stage, packing)}
    return {"packing": {}, "packing_problem": None}


def data_warnings(setup: Setup, packings: Sequence[str]) -> list[str]:
    """Return what is odd about this data for this run. packings: of instructions, by stage."""
    c, mixture, warnings = setup.config, setup.mixture, []
    for number, (_, stage) in enumerate(setup.stages):
        passes = sum(_stream_read(setup, number, packings[number])) / stage.mixture.num_tokens
        if passes >= _MANY_PASSES:
            text = format_count(stage.mixture.num_tokens)
            paths = ", ".join(str(source.path) for source in stage.mixture.sources)
            reader, path = "train.steps", "data.path"
            if number:
                reader, path = f"data.stages[{number - 1}]", f"its path, {paths},"
            warnings.append(f"{reader} reads the {text} tokens of {path} {passes:,.0f} times")
    known = mixture.manifests[0]["tokenizer"]["vocab_size"]
    if c.model.vocab_size > 4 * known:
        warnings.append(
            f"model.vocab_size = {c.model.vocab_size:,}, but the tokenizer of data.path has only "
            f"{known:,} tokens: most of the embedding is never used"
        )
    own = setup.evaluated.own
    used = own.sources if own else mixture.sources
    if left := {s.path for s in mixture.sources} - {s.path for s in used}:
        names = ", ".join(sorted(map(str, left)))
        warnings.append(f"evaluation leaves out {names}: prepared without a validation split")
    trained = {s.fingerprint for _, stage in setup.stages for s in stage.mixture.sources}
    for name, held_out in setup.evaluated.named.items():
        if trained & {s.fingerprint for s in held_out.sources}:
            warnings.append(f"data.validation: {name} is what the run trains on, not held out")
    return warnings


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


def run_facts(
    setup: Setup, programs: Programs, position: "data.Position", start: int
) -> dict[str, Any]:
    """Return what `run.json` says of a run. position: in the data, from step `start` on."""
    machine, config = setup.machine, setup.config
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)
    update, own = programs.update, setup.evaluated.own
    donated = backends.donated_bytes(update)
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
        "program": programs.digest,
        "program_bytes": backends.program_bytes(update),
        "donated_bytes": donated and donated[0],
        "reused_bytes": donated and donated[1],
        "peak_flops": peak[0] if peak else None,
        "peak_source": peak[1] if peak else None,
        "float8_products": _float8_products(setup),
        "lost_features": backends.lost_features(setup.machine.platform),
        "untested_versions": backends.untested_versions(),
        "samples_problem": samples_problem(config, setup.mesh.shape["stage"]),
        "tasks_problem": tasks_problem(setup),
        "eval_loss_of": setup.evaluated.described,
        **packing_record(setup, stage_packings(setup, position, start)),
        "unigram_entropy": own.unigram_loss if own else None,
    }


def run_summary(workdir: Path, checkpointer: Checkpointer, code: int) -> str:
    """Return how a run ended and where its files are."""
    stopped = "stopped; rerun the same command to continue"
    words = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: stopped}
    word = words.get(code, "ended for the reason above")
    report = workdir / "report.html"
    return f"{word}. Checkpoint {previous_checkpoint(checkpointer)}, report {report}"
