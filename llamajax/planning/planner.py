"""Make a plan: what a config takes on a target, from the program that would run there."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from llamajax.backends import Target
from llamajax.backends.platforms import platform_facts
from llamajax.config import RunConfig, stage_named, stages_of
from llamajax.models.counts import flops_per_token
from llamajax.models.machine_choices import float8_warnings
from llamajax.planning.compilation import CompilerFacts, PlannedStep, abstract_step, compiled_facts
from llamajax.planning.roofline import (
    Prediction,
    expected_product_flops,
    link_seconds,
    predict,
)

_NOTABLE = 0.03  # difference of products in the program and by formula that a plan reports


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config takes on a target; None where it cannot be known.

    Bytes are of one device. gradients and activations are parts of the compiler's temporary memory:
    float32 sums of what is trained, and the rest. Of a run with `data.stages` it is the plan of the
    stage that takes most memory, `fits` is of all, and `stages` has the plan of each with its first
    step.
    """

    step: PlannedStep
    facts: CompilerFacts
    params_bytes: int
    optimizer_bytes: int
    activations_bytes: int | None
    peak_bytes: int | None
    limit_bytes: int | None
    fits: bool | None
    prediction: Prediction | None
    stages: "tuple[tuple[int, Plan], ...]" = ()

    @property
    def gradients_bytes(self) -> int:
        """Return the bytes of the float32 sums of what is trained."""
        return shard_bytes(self.step.state.trained)

    @property
    def compiled_product_flops(self) -> float | None:
        """Return the FLOPs of all devices' matrix products in the compiled program, a step."""
        flops = self.facts.product_flops
        return None if flops is None else flops * self.step.mesh.size

    @property
    def expected_product_flops(self) -> float | None:
        """Return the same by formula; None where the formula of this attention is not known."""
        return expected_product_flops(
            self.config, self.step.mesh.shape, attention=self.step.attention.impl
        )

    @property
    def redone_products(self) -> float | None:
        """Return the share of products in the program that the formula does not have."""
        compiled, expected = self.compiled_product_flops, self.expected_product_flops
        return compiled / expected - 1 if compiled and expected else None

    @property
    def config(self) -> RunConfig:
        """The run that was planned."""
        return self.step.config

    def flops(self, *, causal: bool) -> float:
        """Return the FLOPs of a step of all devices; causal: half of the attention matrix."""
        data, frozen = self.config.data, self.config.lora.rank > 0
        each = flops_per_token(self.config.model, data.seq_len, causal=causal, frozen=frozen)
        return data.global_batch_size * data.seq_len * each

    def collective_bytes(self, *, slow: bool = False) -> dict[str, float] | None:
        """Return the bytes a device sends in a step by mesh axis; `a+b` where along both at once.

        slow: only those from one node or slice to another.
        """
        if self.facts.traffic is None:
            return None
        found = collections.Counter(dict.fromkeys(self.step.mesh.axis_names, 0.0))
        for row in self.facts.traffic:
            found["+".join(row.axes)] += row.slow_bytes if slow else row.sent_bytes
        return dict(found)


def make_plan(config: RunConfig, target: Target, *, cache: Path | None) -> Plan:
    """Build, lower and compile the step of `config`, of each of its stages, for `target`.

    Raises UserError where model, batch and mesh do not fit, before anything is compiled.
    """
    stages, steps = stages_of(config), []
    for number, stage in enumerate(stages):
        with stage_named(number):
            steps.append(abstract_step(stage.config, target))
    plans = [_plan(step, cache=cache) for step in steps]
    if len(plans) == 1:
        return plans[0]
    fits = {plan.fits for plan in plans}
    return dataclasses.replace(
        max(plans, key=lambda plan: plan.peak_bytes or plan.facts.arguments_bytes or 0),
        fits=False if False in fits else None if None in fits else True,
        stages=tuple((stage.first_step, plan) for stage, plan in zip(stages, plans, strict=True)),
    )


def _plan(step: PlannedStep, *, cache: Path | None) -> Plan:
    """Compile one step and return its plan."""
    facts, state, target = compiled_facts(step, cache=cache), step.state, step.target
    gradients, peak, temporary = shard_bytes(state.trained), None, None
    if not platform_facts(
        target.machine.platform
    ).is_host:  # temporary memory of a CPU predicts nothing
        peak, temporary = facts.needed_bytes, facts.temporary_bytes
    limit = facts.limit_bytes or (target.entry and target.entry.limit_bytes)
    return Plan(
        step=step,
        facts=facts,
        params_bytes=shard_bytes((state.model, state.adapters)),
        optimizer_bytes=shard_bytes((state.opt_state, state.average)),
        activations_bytes=None if temporary is None else max(0, temporary - gradients),
        peak_bytes=peak,
        limit_bytes=limit,
        fits=_fits(facts, peak, limit),
        prediction=predict_step(step, facts),
    )


def shard_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _fits(facts: CompilerFacts, peak: int | None, limit: int | None) -> bool | None:
    if facts.traffic is None:
        return False  # the compiler refused it
    if limit is None:
        return None
    if peak is not None:
        return peak <= limit
    return False if facts.arguments_bytes > limit else None


def predict_step(step: PlannedStep, facts: CompilerFacts) -> Prediction | None:
    """Predict the times of a compiled step; None where the devices are unknown."""
    entry = step.target.entry
    if facts.traffic is None or entry is None:
        return None
    links_s: collections.Counter[tuple[str, ...]] = collections.Counter()
    for row in facts.traffic:
        links_s[row.axes] += link_seconds(row.sent_bytes, row.slow_bytes, entry)
    waits = [row.waits_s for row in facts.traffic]
    waits_s = None if None in waits else sum(waits)
    kernel = step.attention.impl
    return predict(step.config, step.mesh.shape, entry, links_s, attention=kernel, waits_s=waits_s)


def plan_notes(plan: Plan) -> list[str]:
    """Return what a reader of a plan should know about how it was made."""
    step, facts, target = plan.step, plan.facts, plan.step.target
    notes = []
    notes += [*step.attention.warnings(), *step.compiler_options.warnings()]
    notes += float8_warnings(step.config, target.machine.device_kind)
    left_out = platform_facts(target.machine.platform).deterministic_options
    if step.config.backend.deterministic and left_out:
        names = ", ".join(name for group in left_out for name in group)
        notes.append(
            f"backend.deterministic: compiled without its {names}, for which the compiler needs "
            "the device; a run has it, and may be slower and need other memory"
        )
    if plan.redone_products and abs(plan.redone_products) > _NOTABLE:
        words = f"{abs(plan.redone_products):.1%} {'more' if plan.redone_products > 0 else 'less'}"
        notes.append(
            f"products: the compiled program multiplies {words} than the formula, which has the "
            "recomputation of train.remat"
        )
    if platform_facts(target.machine.platform).is_host:
        notes.append("cpu: temporary memory of a CPU's program predicts no accelerator's; no peak")
        if step.config.train.activation_dtype == "bfloat16":
            notes.append("cpu: XLA moves float32 there where an accelerator moves bfloat16")
    if not target.machine.donates:
        notes.append(
            f"donation: JAX gives {target.machine.platform!r} none, so a step holds weights and "
            "optimizer twice; run the doctor there, or see it repaired with backend.repairs = "
            "donation"
        )
    crosses = any(row.slow_bytes for row in facts.traffic or ())
    if crosses and target.entry is not None and target.entry.slow_bytes_per_s is None:
        notes.append(
            f"time: how fast {target.entry.name} sends between nodes is not in the device table, "
            "so that none is predicted"
        )
    if facts.traffic is None:
        notes.append("the compiler refused the program for its memory: nothing else is known of it")
    return notes
