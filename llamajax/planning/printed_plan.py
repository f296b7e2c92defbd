"""Print a plan for people, and convert it to JSON for scripts."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llamajax import sharding
from llamajax.backends.platforms import platform_facts
from llamajax.models.counts import num_parameters
from llamajax.monitoring.row_format import format_count
from llamajax.planning.compilation import Traffic, node_of
from llamajax.planning.planner import Plan, plan_notes
from llamajax.planning.roofline import pipeline_facts

_GIB = 2**30
_FITS = {True: "yes", False: "no", None: "unknown"}


def to_json(plan: Plan, *, config_file: str) -> dict[str, Any]:
    """Return the plan as JSON values, null where something is unknowable.

    stages: the same of each stage of a run that has several.
    """
    p, config, facts = plan.prediction, plan.config, plan.facts
    pipe = pipeline_facts(config, plan.step.mesh.shape)

    def rounded(sent: dict[str, float] | None) -> dict[str, int] | None:
        return None if sent is None else {axes: round(size) for axes, size in sent.items()}

    return {
        "config": config_file,
        "devices": plan.step.target.text,
        "num_devices": plan.step.mesh.size,
        "device_kind": plan.step.target.machine.device_kind,
        "mesh": dict(plan.step.mesh.shape),
        "remat": config.train.remat,
        "accumulation_steps": config.train.accumulation_steps,
        "attention": plan.step.attention.impl,
        "attention_reason": plan.step.attention.reason,
        "compiler_options": dict(plan.step.compiler_options.values),
        "params_bytes": plan.params_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "gradients_bytes": plan.gradients_bytes,
        "activations_bytes": plan.activations_bytes,
        "arguments_bytes": facts.arguments_bytes,
        "host_bytes": facts.host_bytes,
        "peak_bytes": plan.peak_bytes,
        "limit_bytes": plan.limit_bytes,
        "fits": plan.fits,
        "flops_per_step_full": plan.flops(causal=False),
        "flops_per_step_causal": plan.flops(causal=True),
        "compiled_product_flops": plan.compiled_product_flops,
        "expected_product_flops": plan.expected_product_flops,
        "collective_bytes": rounded(plan.collective_bytes()),
        "slow_bytes": rounded(plan.collective_bytes(slow=True)),
        "collectives": None if facts.traffic is None else list(map(_collective, facts.traffic)),
        "step_time_s": p and p.step_time_s,
        "tokens_per_s": p and p.tokens_per_s,
        "tokens_per_s_per_device": p and p.tokens_per_s / plan.step.mesh.size,
        "mfu_full": p and p.mfu_full,
        "mfu_causal": p and p.mfu_causal,
        "terms": None if p is None else {
            "products_s": p.products_s, "attention_s": p.attention_s, "memory_s": p.memory_s,
            "links_s": p.links_s, "hidden_s": p.hidden_s, "bubble": pipe.bubble if pipe else 0.0,
            "bubble_s": p.bubble_s,
        },
        "pipeline": pipe and dataclasses.asdict(pipe),
        "program": facts.digest,
        "compile_s": facts.compile_s,
        "cached": facts.cached,
        "versions": plan.step.target.machine.versions,
        "notes": plan_notes(plan),
        "stages": [
            {"first_step": first_step} | to_json(each, config_file=config_file)
            for first_step, each in plan.stages
        ],
    }  # fmt: skip


def _collective(row: Traffic) -> dict[str, Any]:
    sizes = {"sent_bytes": round(row.sent_bytes), "slow_bytes": round(row.slow_bytes)}
    return dataclasses.asdict(row) | sizes


def text_lines(plan: Plan) -> Iterator[str]:
    """Yield the plan as a table for people."""
    yield from _stages(plan)
    c, step, target = plan.config, plan.step, plan.step.target
    tokens = c.data.global_batch_size * c.data.seq_len
    yield (
        f"{c.model.name or 'custom model'}, {format_count(num_parameters(c.model))} parameters, on "
        f"{target.text} ({target.machine.device_kind}): {sharding.describe(step.mesh)}"
    )
    yield (
        f"{c.data.global_batch_size} x {c.data.seq_len} = {format_count(tokens)} tokens a step, "
        f"{c.train.accumulation_steps} accumulated; {c.train.dtype}, remat {c.train.remat}, "
        f"attention {step.attention.impl}"
    )
    for line in sharding.device_order_table(step.mesh, node_of(target)):
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
    yield f"  {'fits':<26}{_FITS[plan.fits]:>14}"
    if plan.facts.host_bytes:
        yield f"  {'in the host instead':<26}{_gib(plan.facts.host_bytes):>14}"
    yield ""
    for words, causal in (("whole attention matrix", False), ("causal half of it", True)):
        yield f"  FLOPs a step, {words:<24}{plan.flops(causal=causal):>12.4g}"
    for words, flops in (
        ("matrix products as compiled", plan.compiled_product_flops),
        ("as expected", plan.expected_product_flops),
    ):
        if flops is not None:
            yield f"  {words:<38}{flops:>12.4g}"
    yield from _pipeline(plan)
    yield from _traffic(plan)
    yield from _time(plan)
    again = " (stored from an earlier plan)" if plan.facts.cached else ""
    yield ""
    yield f"  compiled in {plan.facts.compile_s:.1f} s{again}"
    for note in plan_notes(plan):
        yield f"  note: {note}"


def _stages(plan: Plan) -> Iterator[str]:
    """Yield a table of the stages of a run."""
    if not plan.stages:
        return
    yield (
        f"{'stage':>5}{'from step':>11}{'batch':>8}{'seq_len':>9}{'peak':>14}{'fits':>9}"
        f"{'s a step':>10}{'tokens/s':>12}"
    )
    for number, (first_step, each) in enumerate(plan.stages):
        data, p = each.config.data, each.prediction
        speed = (
            f"{'-':>10}{'-':>12}"
            if p is None
            else f"{p.step_time_s:>10.3f}{p.tokens_per_s:>12,.0f}"
        )
        yield (
            f"{number:>5}{first_step:>11}{data.global_batch_size:>8}{data.seq_len:>9}"
            f"{_gib(each.peak_bytes):>14}{_FITS[each.fits]:>9}{speed}"
        )
    yield ""
    yield "the stage that takes most memory:"


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
    traffic = plan.facts.traffic
    if traffic is None:
        return
    yield ""
    yield "what a device sends in a step"
    slow_link = platform_facts(plan.step.target.machine.platform).slow_link
    for row in traffic:
        if row.sent_bytes >= 1e-3 * traffic[0].sent_bytes:
            slow = f"  {_gib(row.slow_bytes)} of it {slow_link}" if row.slow_bytes else ""
            yield (
                f"  {' x '.join(row.axes):<18}{row.kind:<20}{row.dtype:<6}{row.calls:>8} calls"
                f"{_gib(row.sent_bytes):>14}{slow}"
            )
    if not traffic:
        yield "  nothing"


def _time(plan: Plan) -> Iterator[str]:
    p, entry = plan.prediction, plan.step.target.entry
    if p is None:
        return
    yield ""
    yield "predicted time of a step, not measured"
    for name, seconds in (
        ("matrix products", p.products_s),
        ("attention", p.attention_s),
        ("memory traffic", p.memory_s),
        *((f"links: {axes}", seconds) for axes, seconds in p.links_s.items() if seconds > 1e-4),
        ("sent beside products", 0 - p.hidden_s),
        ("pipeline bubble", p.bubble_s),
        ("step", p.step_time_s),
    ):
        yield f"  {name:<32}{seconds:>10.3f} s"
    yield (f"  assumed: products at {entry.efficiency:.0%} of the peak; {_hiding(plan)}")
    yield (
        f"  {p.tokens_per_s:,.0f} tokens/s, {p.tokens_per_s / plan.step.mesh.size:,.0f} a device; "
        f"MFU {p.mfu_full:.1%} full, {p.mfu_causal:.1%} causal"
    )


def _hiding(plan: Plan) -> str:
    if any(row.waits_s is None for row in plan.facts.traffic):
        return "what fsdp sends hides behind those of the same pass, all else is waited for"
    return "what is sent beside them is read from the compiled program"


def search_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield a table of the plans that a search found, best first."""
    yield f"{'tokens/s a device':>18}{'peak GiB':>10}{'fits':>9}  mesh, accumulation, remat"
    for plan in plans:
        p, t = plan.prediction, plan.config.train
        speed = "-" if p is None else f"{p.tokens_per_s / plan.step.mesh.size:,.0f}"
        peak = "-" if plan.peak_bytes is None else f"{plan.peak_bytes / _GIB:.1f}"
        yield (
            f"{speed:>18}{peak:>10}{_FITS[plan.fits]:>9}  {sharding.describe(plan.step.mesh)}, "
            f"{t.accumulation_steps}, {t.remat}"
        )


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / _GIB:.3f} GiB"
