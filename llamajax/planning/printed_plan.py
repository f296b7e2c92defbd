"""A plan for people and for scripts."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llamajax import sharding
from llamajax.backends.platforms import platform_facts
from llamajax.models.counts import num_parameters
from llamajax.monitoring.progress import format_count
from llamajax.planning.compilation import node_of
from llamajax.planning.planner import Plan
from llamajax.planning.roofline import pipeline_facts

_GIB = 2**30


def to_json(plan: Plan, *, config_file: str) -> dict[str, Any]:
    """The plan as JSON values, null where something is unknowable."""
    p, config, facts = plan.prediction, plan.config, plan.facts
    sent, slow = plan.collective_bytes(), plan.collective_bytes(slow=True)
    pipe = pipeline_facts(config, plan.step.mesh.shape)
    return {
        "config": config_file,
        "devices": plan.step.target.text,
        "num_devices": plan.step.mesh.size,
        "device_kind": plan.step.target.device_kind,
        "mesh": dict(plan.step.mesh.shape),
        "remat": config.train.remat,
        "accumulation_steps": config.train.accumulation_steps,
        "attention": plan.step.runs_attention,
        "attention_compiled": plan.step.attention,
        "params_bytes": plan.params_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "gradients_bytes": plan.gradients_bytes,
        "activations_bytes": plan.activations_bytes,
        "arguments_bytes": facts.arguments_bytes,
        "host_bytes": facts.host_bytes,
        "peak_bytes": plan.peak_bytes,
        "limit_bytes": plan.limit_bytes,
        "fits": plan.fits,
        "flops_per_step_full": plan.flops[False],
        "flops_per_step_causal": plan.flops[True],
        "collective_bytes": None if sent is None else {a: round(b) for a, b in sent.items()},
        "slow_bytes": None if slow is None else {a: round(b) for a, b in slow.items()},
        "collectives": None if facts.traffic is None else [
            {"kind": t.kind, "axes": list(t.axes), "dtype": t.dtype, "calls": t.calls,
             "sent_bytes": round(t.sent_bytes), "slow_bytes": round(t.slow_bytes)}
            for t in facts.traffic
        ],
        "step_time_s": p and p.step_time_s,
        "tokens_per_s": p and p.tokens_per_s,
        "tokens_per_s_per_device": p and p.tokens_per_s / plan.step.mesh.size,
        "mfu_full": p and p.mfu_full,
        "mfu_causal": p and p.mfu_causal,
        "terms": None if p is None else {
            "products_s": p.products_s, "attention_s": p.attention_s, "memory_s": p.memory_s,
            "links_s": p.links_s, "hidden_s": p.hidden_s, "bubble": p.bubble,
            "bubble_s": p.bubble_s,
        },
        "pipeline": pipe and dataclasses.asdict(pipe),
        "compile_s": facts.compile_s,
        "cached": facts.cached,
        "versions": plan.step.target.versions,
        "notes": list(plan.notes),
    }  # fmt: skip


def to_text(plan: Plan) -> str:
    """The plan as a table for people."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    c, step, target = plan.config, plan.step, plan.step.target
    tokens = c.data.global_batch_size * c.data.seq_len
    yield (
        f"{c.model.name or 'custom model'}, {format_count(num_parameters(c.model))} parameters, on "
        f"{target.text} ({target.device_kind}): {sharding.describe(step.mesh)}"
    )
    yield (
        f"{c.data.global_batch_size} x {c.data.seq_len} = {format_count(tokens)} tokens a step, "
        f"{c.train.accumulation_steps} accumulated; {c.train.dtype}, remat {c.train.remat}, "
        f"attention {step.runs_attention}"
    )
    for line in sharding.placement_table(step.mesh, node_of(target)):
        yield f"  {line}"
    yield ""
    yield "memory of a device"
    for name, size in (
        ("parameters", plan.params_bytes),
        ("optimizer", plan.optimizer_bytes),
        ("gradients", plan.gradients_bytes),
        ("activations and the rest", plan.activations_bytes),
        ("peak", plan.peak_bytes),
        ("limit", plan.limit_bytes),
    ):
        yield f"  {name:<26}{_gib(size):>14}"
    yield f"  {'fits':<26}{_verdict(plan.fits):>14}"
    if plan.facts.host_bytes:
        yield f"  {'in the host instead':<26}{_gib(plan.facts.host_bytes):>14}"
    yield ""
    for words, causal in (("whole attention matrix", False), ("causal half of it", True)):
        yield f"  FLOPs a step, {words:<24}{plan.flops[causal]:>12.4g}"
    yield from _pipeline(plan)
    if plan.facts.traffic is not None:
        yield from _traffic(plan)
    if plan.prediction is not None:
        yield from _time(plan)
    again = " (stored from an earlier plan)" if plan.facts.cached else ""
    yield ""
    yield f"  compiled in {plan.facts.compile_s:.1f} s{again}"
    for note in plan.notes:
        yield f"  note: {note}"


def _pipeline(plan: Plan) -> Iterator[str]:
    facts = pipeline_facts(plan.config, plan.step.mesh.shape)
    if facts is None:
        return
    yield ""
    yield (
        f"pipeline of {facts.stages} stages, {facts.microbatches} microbatches, rounds "
        f"{facts.rounds}: {facts.bubble:.1%} of the ticks idle"
    )
    kept = plan.config.train.remat_stage
    for words, size, marked in (
        ("inputs of the stage", facts.stage_inputs_bytes, kept),
        ("inputs of its layers", facts.layer_inputs_bytes, not kept),
    ):
        yield f"  {words:<26}{_gib(size):>14}{'  kept for the backward pass' if marked else ''}"


def _traffic(plan: Plan) -> Iterator[str]:
    yield ""
    yield "what a device sends in a step"
    for row in plan.facts.traffic:
        if row.sent_bytes >= 1e-3 * plan.facts.traffic[0].sent_bytes:
            axes = " x ".join(row.axes)
            yield (
                f"  {axes:<18}{row.kind:<20}{row.dtype:<6}{row.calls:>8} calls"
                f"{_gib(row.sent_bytes):>14}{_between(plan, row.slow_bytes)}"
            )
    if not plan.facts.traffic:
        yield "  nothing"


def _between(plan: Plan, slow_bytes: float) -> str:
    """How much of what a collective sends leaves the node or slice; nothing where none does."""
    if not slow_bytes:
        return ""
    return f"  {_gib(slow_bytes)} of it {platform_facts(plan.step.target.platform).slow_link}"


def _time(plan: Plan) -> Iterator[str]:
    p = plan.prediction
    yield ""
    yield "predicted time of a step, not measured"
    rows = [
        ("matrix products", p.products_s),
        ("attention", p.attention_s),
        ("memory traffic", p.memory_s),
        *((f"links: {axes}", seconds) for axes, seconds in p.links_s.items() if seconds > 1e-4),
        ("hidden behind products", -p.hidden_s),
        ("pipeline bubble", p.bubble_s),
        ("step", p.step_time_s),
    ]
    for name, seconds in rows:
        yield f"  {name:<32}{seconds:>10.3f} s"
    each = p.tokens_per_s / plan.step.mesh.size
    entry = plan.step.target.entry
    yield (
        f"  assumed: products at {entry.efficiency:.0%} of the peak; what fsdp sends hides behind "
        "them, all else is waited for"
    )
    yield (
        f"  {p.tokens_per_s:,.0f} tokens/s, {each:,.0f} a device; MFU {p.mfu_full:.1%} full, "
        f"{p.mfu_causal:.1%} causal"
    )


def search_text(plans: Sequence[Plan]) -> str:
    """What a search found, best first."""
    lines = [f"{'tokens/s a device':>18}{'peak GiB':>10}{'fits':>9}  mesh, accumulation, remat"]
    for plan in plans:
        p = plan.prediction
        speed = "-" if p is None else f"{p.tokens_per_s / plan.step.mesh.size:,.0f}"
        peak = "-" if plan.peak_bytes is None else f"{plan.peak_bytes / _GIB:.1f}"
        t = plan.config.train
        lines.append(
            f"{speed:>18}{peak:>10}{_verdict(plan.fits):>9}  {sharding.describe(plan.step.mesh)}, "
            f"{t.accumulation_steps}, {t.remat}"
        )
    return "\n".join(lines)


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / _GIB:.3f} GiB"


def _verdict(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[fits]
