"""Constraints between keys. Each problem names the value, the constraint and the fix.

A rule reads valid values by path. If one is absent (mistyped, not set or out of range, which is
reported elsewhere), the KeyError skips the rule, so that one mistake never hides another.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from llamajax.config.forms import parse_steps
from llamajax.config.keys import own_keys
from llamajax.config.model_schema import ROPE_KEYS, RopeScaling
from llamajax.config.schema import LORA_TARGETS
from llamajax.config.values import show

Values = Mapping[str, Any]  # by path


def check(values: Values) -> list[str]:
    """Return every violated constraint among the values."""
    problems = []
    for rule in _RULES:
        with contextlib.suppress(KeyError):
            problems += list(rule(values))
    return problems


def _even_head(v: Values) -> Iterator[str]:
    size = v["model.head_size"]
    if size % 2:
        yield (
            f"model.head_size = {size}: must be even, the rotary embedding turns pairs; "
            f"make it {size - 1} or {size + 1}"
        )


def _kv_heads(v: Values) -> Iterator[str]:
    heads, kv_heads = v["model.num_heads"], v["model.num_kv_heads"]
    if heads % kv_heads:
        fits = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        yield (
            f"model.num_kv_heads = {kv_heads}: must divide model.num_heads = {heads}; "
            f"choose one of {fits}"
        )


def _rope_scaling(v: Values) -> Iterator[str]:
    path = "model.rope_scaling"
    kind, keys = v[f"{path}.type"], own_keys(RopeScaling)
    required, optional = ROPE_KEYS[kind]
    given = {name: v[f"{path}.{name}"] for name in keys if f"{path}.{name}" in v}
    if missing := [name for name in required if given.get(name, keys[name]) is None]:
        yield f"{path}.type = {kind}: needs {' and '.join(f'{path}.{name}' for name in missing)}"
    for name, value in given.items():
        if name not in ("type", *required, *optional) and value != keys[name].default:
            takes = " or ".join(k for k, each in ROPE_KEYS.items() if name in sum(each, ()))
            default = show(keys[name].default)
            yield f"{path}.{name} = {value}: is of type {takes}, not {kind}; set it to {default}"
    pairs = {
        "llama3": ("low_freq_factor", "high_freq_factor", "published models use 1 and 4"),
        "yarn": ("beta_slow", "beta_fast", "1 and 32 are usual"),
    }
    low, high, usual = pairs.get(kind, ("", "", ""))
    ends = given.get(low), given.get(high)
    if None not in ends and ends[0] >= ends[1]:
        yield f"{path}.{low} = {ends[0]}: must be below {path}.{high} = {ends[1]}; {usual}"
    original, seq_len = given.get("original_max_seq_len"), v.get("data.seq_len", 0)
    if kind == "yarn" and original and seq_len > given.get("factor", math.inf) * original:
        yield (
            f"data.seq_len = {seq_len}: is longer than the context of {path}, factor = "
            f"{given['factor']:g} x original_max_seq_len = {original}; make factor at least "
            f"{seq_len / original:g}"
        )


def _context(v: Values) -> Iterator[str]:
    seq_len, longest = v["data.seq_len"], v["model.max_seq_len"]
    if seq_len > longest:
        yield (
            f"data.seq_len = {seq_len}: is longer than model.max_seq_len = {longest}; "
            "shorten the samples, or raise model.max_seq_len if the model is meant for it"
        )


def _mesh(v: Values) -> Iterator[str]:
    sizes = {path: size for path, size in v.items() if path.startswith("mesh.")}
    for path, size in sizes.items():
        if size != -1 and size < 1:
            yield f"{path} = {size}: must be at least 1, or -1 for all the devices that are left"
    rest = [path for path, size in sizes.items() if size == -1]
    if len(rest) > 1:
        yield f"{' and '.join(rest)} are -1: only one axis can take the devices that are left"


def _batch(v: Values) -> Iterator[str]:
    batch, steps = v["data.global_batch_size"], v["train.accumulation_steps"]
    shards = max(v["mesh.data"], 1) * max(v["mesh.fsdp"], 1)
    if batch % steps:
        reason, divisor = f"must be a multiple of train.accumulation_steps = {steps}", steps
    elif (batch // steps) % shards:
        divisor = steps * shards
        reason = (
            f"each of {steps} microbatches is split over mesh.data x mesh.fsdp = {shards} devices, "
            f"so it must be a multiple of {divisor}"
        )
    else:
        return
    below = batch // divisor * divisor
    fix = f"make it {below} or {below + divisor}" if below else f"make it {divisor}"
    yield f"data.global_batch_size = {batch}: {reason}; {fix}"


def _weights(v: Values) -> Iterator[str]:
    weights, num_paths = v["data.weights"], len(v["data.path"].split(","))
    if weights is None:
        return
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != num_paths:
        yield (
            f"data.weights = {shown}: {len(weights)} weights for {num_paths} directories in "
            "data.path; give one for each, or none"
        )
    if any(weight <= 0 for weight in weights):
        yield f"data.weights = {shown}: each must be above 0; leave the directory out"


def _warmup(v: Values) -> Iterator[str]:
    warmup, steps = v["optim.warmup_steps"], v["train.steps"]
    if warmup > steps:
        yield (
            f"optim.warmup_steps = {warmup}: is more than train.steps = {steps}, the learning rate "
            "would never reach its peak; lower optim.warmup_steps"
        )


def _decay(v: Values) -> Iterator[str]:
    schedule, decay = v["optim.schedule"], v["optim.decay_steps"]
    if schedule != "wsd" and decay is not None:
        yield (
            f"optim.decay_steps = {decay}: only optim.schedule = wsd takes it, this is {schedule}; "
            "set it to none"
        )
    if schedule != "wsd":
        return
    if decay is None:
        yield "optim.decay_steps = none: optim.schedule = wsd needs it; try a tenth of train.steps"
        return
    warmup, steps = v["optim.warmup_steps"], v["train.steps"]
    if warmup <= steps < warmup + decay:
        yield (
            f"optim.decay_steps = {decay}: with optim.warmup_steps = {warmup} it is more than "
            f"train.steps = {steps}; make it at most {steps - warmup}"
        )


def _final_rate(v: Values) -> Iterator[str]:
    final, peak = v["optim.final_learning_rate"], v["optim.learning_rate"]
    if v["optim.schedule"] != "constant" and final > peak:
        yield (
            f"optim.final_learning_rate = {final}: is above the peak optim.learning_rate = {peak}; "
            "lower it (0 or a tenth of the peak are usual)"
        )


def _muon(v: Values) -> Iterator[str]:
    own, chain = v["optim.muon_learning_rate"], v["optim.chain"]
    if own is not None and (v["optim.name"] != "muon" or chain is not None):
        yield (
            f"optim.muon_learning_rate = {own}: is of optim.name = muon alone; set it to none, or "
            "choose muon, without optim.chain"
        )
    if chain is not None and v["optim.name"] != "adamw":
        yield (
            f"optim.chain = {chain} and optim.name = {v['optim.name']}: a chain is the whole "
            "optimizer; choose one of the two"
        )


def _remat(v: Values) -> Iterator[str]:
    for path in ("train.remat_keep", "train.remat_offload"):
        if v[path] and v["train.remat"] in ("none", "dots"):
            yield (
                f"{path} = {','.join(v[path])}: train.remat = {v['train.remat']} keeps more than "
                "names can say; set train.remat to full, save_attention or save_qkv"
            )


def _continuation(v: Values) -> Iterator[str]:
    step = v["train.resume_step"]
    if step is not None and v["train.restart"]:
        yield f"train.resume_step = {step} and train.restart = true: choose one of the two"


def _lora_base(v: Values) -> Iterator[str]:
    if v["lora.rank"] > 0 and v["train.init_from"] is None:
        yield (
            f"lora.rank = {v['lora.rank']}: adapters need weights to adapt; set train.init_from "
            "to their directory, or lora.rank to 0 to train all weights"
        )


def _targets(v: Values) -> Iterator[str]:
    used = {
        "lora.targets": v["lora.rank"] > 0,
        "train.float8_targets": v["train.dtype"] == "float8",
    }
    for path, is_used in used.items():
        if is_used and not v[path]:
            yield f"{path}: is empty; name some of {', '.join(LORA_TARGETS)}"


def _profile_steps(v: Values) -> Iterator[str]:
    text, steps = v["monitoring.profile_steps"], v["train.steps"]
    if text is not None and parse_steps(text)[1] > steps:
        yield (
            f"monitoring.profile_steps = {text}: ends behind train.steps = {steps}; choose steps "
            "of the run"
        )


def _lora_rank(v: Values) -> Iterator[str]:
    keys = {"D": "hidden_size", "N": "num_heads", "K": "num_kv_heads", "H": "head_size"}
    keys["F"] = "intermediate_size"
    sizes = [
        (math.prod(v[f"model.{keys[letter]}"] for letter in letters), target)
        for target in v["lora.targets"]
        for letters in LORA_TARGETS[target]
    ]
    least, target = min(sizes, default=(math.inf, ""))
    if v["lora.rank"] > least:
        yield (
            f"lora.rank = {v['lora.rank']}: is more than {least}, the smaller dimension of the "
            f"{target} matrix, which has no higher rank; make it at most {least}"
        )


def _spikes(v: Values) -> Iterator[str]:
    factor = v["guard.spike_factor"]
    if factor is not None and v["guard.nonfinite"] == "off":
        yield (
            f"guard.spike_factor = {factor}: needs guard.nonfinite = skip or stop, as a loss that "
            "is not finite would enter the median"
        )


def _plugin(v: Values) -> Iterator[str]:
    for path in ("backend.plugin", "backend.options"):
        if v[path] is not None and v["backend.name"] is None:
            yield f"{path} = {v[path]}: needs backend.name, the plugin's platform"


def _processes(v: Values) -> Iterator[str]:
    names = ("coordinator_address", "num_processes", "process_id")
    given = {f"backend.{name}": v[f"backend.{name}"] for name in names}
    missing = [path for path, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        present = ", ".join(f"{path} = {x}" for path, x in given.items() if x is not None)
        yield f"{present}: needs {' and '.join(missing)} as well; set all three or none"
    if missing:
        return
    _, count, rank = given.values()
    if rank >= count:
        yield (
            f"backend.process_id = {rank}: must be below backend.num_processes = {count}; "
            f"ranks go from 0 to {count - 1}"
        )


_RULES = (
    _even_head, _kv_heads, _rope_scaling, _context, _mesh, _batch, _weights, _warmup, _decay,
    _final_rate, _muon, _remat, _continuation, _lora_base, _targets, _lora_rank, _spikes, _plugin,
    _processes, _profile_steps,
)  # fmt: skip
