"""What a run says of itself: on the terminal when it starts and ends, and in `run.json`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax import backends, sharding
from llamajax.checkpoint import Checkpointer
from llamajax.checkpoint.location import is_url
from llamajax.config import RunConfig
from llamajax.errors import ExitCode, UserError
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.lora import num_adapter_parameters
from llamajax.monitoring import write_report
from llamajax.monitoring.progress import format_count
from llamajax.training.loop import Loop
from llamajax.training.session import Session
from llamajax.training.workdir import say

_MANY_PASSES = 100  # over the same text


def greet(session: Session, start: int) -> None:
    """Say once what runs where, and from which step."""
    c, m = session.config, session.machine
    tokens = c.data.global_batch_size * c.data.seq_len
    peak = backends.peak_flops(m.device_kind, c.train.dtype)
    if session.held_out is None:
        say("warning: the data has no validation split: no evaluation", primary=m.is_primary)
    for line in data_warnings(session):
        say(f"warning: {line}", primary=m.is_primary)
    trained = f", {format_count(num_trained(c))} trained" if c.lora.rank else ""
    for line in (
        f"model    {c.model.name or 'custom'}, {format_count(num_parameters(c.model))} parameters"
        + trained,
        f"machine  {m.platform}, {m.device_kind}; mesh {sharding.describe(session.mesh)}",
        *backends.profile_lines(backends.machine_profile(m), m.note),
        *lost_feature_warnings(lost_features(session)),
        *(f"layout   {line}" for line in sharding.device_order_table(session.mesh)),
        f"compute  {c.train.dtype}, attention {session.compute.attention}, remat {c.train.remat}",
        f"peak     {peak[0] / 1e12:g} TFLOP/s a device ({peak[1]})"
        if peak
        else f"peak     unknown for {m.device_kind!r}: no MFU",
        f"data     {c.data.path}; {c.data.global_batch_size} x {c.data.seq_len} = "
        f"{format_count(tokens)} tokens a step",
        f"steps    {c.train.steps}, continuing from step {start}"
        if start
        else f"steps    {c.train.steps}, from {c.train.init_from or 'the beginning'}",
    ):
        say(line, primary=m.is_primary)


def data_warnings(session: Session) -> list[str]:
    """Return what is odd about this data for this run."""
    c, mixture, warnings = session.config, session.mixture, []
    passes = c.train.steps * c.data.global_batch_size * c.data.seq_len / mixture.num_tokens
    if passes >= _MANY_PASSES:
        text = format_count(mixture.num_tokens)
        warnings.append(f"train.steps reads the {text} tokens of data.path {passes:,.0f} times")
    known = mixture.manifests[0]["tokenizer"]["vocab_size"]
    if c.model.vocab_size > 4 * known:
        warnings.append(
            f"model.vocab_size = {c.model.vocab_size:,}, but the tokenizer of data.path has only "
            f"{known:,} tokens: most of the embedding is never used"
        )
    used = session.held_out.sources if session.held_out else mixture.sources
    if left := {s.path for s in mixture.sources} - {s.path for s in used}:
        names = ", ".join(sorted(map(str, left)))
        warnings.append(f"evaluation leaves out {names}: prepared without a validation split")
    return warnings


def lost_features(session: Session) -> dict[str, str]:
    """Return what the run does without because a private part of a library has changed, and why."""
    uses_gcs = is_url(session.config.checkpoint.directory)
    return backends.lost_features(session.machine.platform, uses_gcs=uses_gcs)


def lost_feature_warnings(lost: dict[str, str]) -> list[str]:
    """Return the warning that a run prints about them, or nothing."""
    reasons = "; ".join(f"{feature}: {reason}" for feature, reason in lost.items())
    return [f"warning: this run does without {reasons}"] if lost else []


def say_of_donation(session: Session, step: Any) -> None:
    """Say how much of the state a compiled step keeps a second time, if any of it."""
    donated = backends.donated_bytes(step)
    if donated and donated[1] < donated[0]:
        twice = (donated[0] - donated[1]) / 2**30
        say(
            f"warning: the step does not reuse {twice:.3g} GiB of its state on each device, which "
            "lives twice",
            primary=session.machine.is_primary,
        )


def num_trained(config: RunConfig) -> int:
    """Number of weights that updates change."""
    if config.lora.rank:
        return num_adapter_parameters(config.model, config.lora)
    return num_parameters(config.model)


def previous(checkpointer: Checkpointer) -> str:
    """The checkpoint that a rerun continues from."""
    try:
        steps = checkpointer.steps()
    except (UserError, OSError):
        return f"the newest in {checkpointer.directory}, which cannot be read now"
    return f"{checkpointer.directory / str(steps[-1])}" if steps else "none yet, it starts anew"


def rates(session: Session) -> Callable[[float], dict[str, float | None]]:
    """Both MFUs as fractions from tokens/s; null where the peak of the device is not known."""
    config, machine = session.config, session.machine
    peak = backends.peak_flops(machine.device_kind, config.train.dtype)

    def rates(tokens_per_s: float) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, causal in (("mfu_full", False), ("mfu_causal", True)):
            flops = flops_per_token(
                config.model, config.data.seq_len, causal=causal, frozen=config.lora.rank > 0
            )
            total = peak and peak[0] * machine.num_devices
            found[name] = total and tokens_per_s * flops / total
        return found

    return rates


def facts(session: Session, step: Any) -> dict[str, Any]:
    """What `run.json` says of a run that has begun, with its compiled step."""
    machine = session.machine
    peak = backends.peak_flops(machine.device_kind, session.config.train.dtype)
    facts = dataclasses.asdict(machine)
    del facts["process_id"]
    facts["profile"] = backends.machine_profile(machine)
    donated = backends.donated_bytes(step)
    return facts | {
        "mesh": dict(session.mesh.shape),
        "attention": session.compute.attention,
        "num_parameters": num_parameters(session.config.model),
        "num_trained_parameters": num_trained(session.config),
        "program_bytes": backends.program_bytes(step),
        "donated_bytes": donated and donated[0],
        "reused_bytes": donated and donated[1],
        "peak_flops": peak[0] if peak else None,
        "peak_source": peak[1] if peak else None,
        "lost_features": lost_features(session),
        "untested_versions": backends.untested_versions(),
        "unigram_entropy": session.held_out.unigram_loss if session.held_out else None,
    }


def conclude(loop: Loop, workdir: Path, code: int) -> None:
    """Write the report; say where things are."""
    try:
        write_report(workdir)
    except (OSError, UserError) as error:
        say(f"warning: no report was written: {error}")
        return
    stopped = "stopped; rerun the same command to continue"
    words = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: stopped}
    word = words.get(code, "ended for the reason above")
    say(f"{word}. Checkpoint {previous(loop.checkpointer)}, report {workdir / 'report.html'}")
