"""One plan: what a config takes on a target, from the program that would run there."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llamajax.backends import Target, platform_facts
from llamajax.config import RunConfig
from llamajax.models.counts import flops_per_token
from llamajax.planning.compilation import Facts, Step, abstract_step, compiled_facts
from llamajax.planning.roofline import Prediction, link_seconds, predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config takes on a target; None where it cannot be known.

    Bytes are of one device. gradients and activations are parts of the compiler's temporary memory:
    float32 sums of what is trained, and the rest. FLOPs are of a step of all devices.
    """

    step: Step
    facts: Facts
    params_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int | None
    peak_bytes: int | None
    limit_bytes: int | None
    fits: bool | None
    flops: dict[bool, float]  # by causal
    prediction: Prediction | None
    notes: tuple[str, ...]

    @property
    def config(self) -> RunConfig:
        """The run that was planned."""
        return self.step.config

    def collective_bytes(self, *, slow: bool = False) -> dict[str, float] | None:
        """Bytes that a device sends in a step by mesh axis; `a+b` where along both at once.

        slow: only those from one node or slice to another.
        """
        if self.facts.traffic is None:
            return None
        found = dict.fromkeys(self.step.mesh.axis_names, 0.0)
        for row in self.facts.traffic:
            name = "+".join(row.axes)
            found[name] = found.get(name, 0.0) + (row.slow_bytes if slow else row.sent_bytes)
        return found


def make_plan(config: RunConfig, target: Target, *, cache: Path | None) -> Plan:
    """Build, lower and compile the step of `config` for `target`.

    Raises UserError where model, batch and mesh do not fit, before anything is compiled.
    """
    step = abstract_step(config, target)
    return _judged(step, compiled_facts(step, cache=cache))


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _judged(step: Step, facts: Facts) -> Plan:
    config, target, state = step.config, step.target, step.state
    weights = (state.model, state.adapters)
    gradients = shard_bytes(state.trained)
    # Temporary memory of a CPU predicts nothing.
    measures_memory = not platform_facts(target.platform).is_host
    peak = facts.needed_bytes if measures_memory else None
    limit = facts.limit_bytes or (target.entry and target.entry.limit_bytes)
    temporary = facts.temporary_bytes if measures_memory else None
    return Plan(
        step=step,
        facts=facts,
        params_bytes=shard_bytes(weights),
        optimizer_bytes=shard_bytes(state.opt_state),
        gradients_bytes=gradients,
        activations_bytes=None if temporary is None else max(0, temporary - gradients),
        peak_bytes=peak,
        limit_bytes=limit,
        fits=_fits(facts, peak, limit),
        flops=_flops(config),
        prediction=_prediction(step, facts),
        notes=tuple(_notes(step, facts)),
    )


def _fits(facts: Facts, peak: int | None, limit: int | None) -> bool | None:
    if facts.traffic is None:
        return False  # the compiler refused it
    if limit is None:
        return None
    if peak is not None:
        return peak <= limit
    return False if facts.arguments_bytes > limit else None


def _flops(config: RunConfig) -> dict[bool, float]:
    tokens = config.data.global_batch_size * config.data.seq_len
    frozen = config.lora.rank > 0
    one = lambda causal: flops_per_token(  # noqa: E731
        config.model, config.data.seq_len, causal=causal, frozen=frozen
    )
    return {causal: tokens * one(causal) for causal in (False, True)}


def _prediction(step: Step, facts: Facts) -> Prediction | None:
    if facts.traffic is None or step.target.entry is None:
        return None
    entry = step.target.entry
    links_s: dict[tuple[str, ...], float | None] = {}
    for row in facts.traffic:
        seconds = link_seconds(row.sent_bytes, row.slow_bytes, entry)
        before = links_s.get(row.axes, 0.0)
        links_s[row.axes] = None if None in (before, seconds) else before + seconds
    sizes: Mapping[str, int] = dict(step.mesh.shape)
    return predict(step.config, sizes, entry, links_s, attention=step.runs_attention)


def _notes(step: Step, facts: Facts) -> list[str]:
    notes = []
    if step.attention != step.runs_attention:
        notes.append(
            f"attention: compiled with {step.attention!r}, because {step.runs_attention!r}, which "
            "train uses there, is built on the hardware alone; neither holds a T x S matrix, so "
            f"that memory is alike, and time is predicted for {step.runs_attention!r}"
        )
    if platform_facts(step.target.platform).is_host:
        notes.append("cpu: temporary memory of a CPU's program predicts no accelerator's; no peak")
        if step.config.train.dtype == "bfloat16":
            notes.append("cpu: XLA moves float32 there where an accelerator moves bfloat16")
    if not step.target.machine().donates:
        notes.append(
            f"donation: JAX gives {step.target.platform!r} none, so weights and optimizer live "
            "twice in a step; run the doctor there, or see it repaired with backend.repairs = "
            "donation"
        )
    entry = step.target.entry
    crosses = any(row.slow_bytes for row in facts.traffic or ())
    if crosses and entry is not None and entry.slow_bytes_per_s is None:
        notes.append(
            f"time: how fast {entry.name} sends between nodes is not in the device table, so that "
            "none is predicted"
        )
    if facts.traffic is None:
        notes.append("the compiler refused the program for its memory: nothing else is known of it")
    return notes
