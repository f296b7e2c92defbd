"""Constraints on the values of keys. Each problem names the value, the constraint and the fix.

A rule reads the valid values by path. If one is absent (mistyped or not set, which is reported
elsewhere), the KeyError skips the rule: one mistake never hides another.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llamajax.config.keys import all_keys
from llamajax.config.schema import LORA_TARGETS, REMAT_NAMES
from llamajax.errors import did_you_mean, nearest

Values = Mapping[str, Any]  # by path

# Without the characters that fsspec takes for patterns when it deletes.
_GS_FOLDER = re.compile(r"gs://[^/*?\[\]]+/[^*?\[\]]*[^/*?\[\]]/?")


def check(values: Values) -> list[str]:
    """Return every violated constraint among valid values: ranges first, then the rules."""
    problems = [
        f"{path} = {value}: {problem}"
        for path, value in values.items()
        if (problem := all_keys()[path].out_of_range(value))
    ]
    for rule in _RULES:
        with contextlib.suppress(KeyError):
            problems += list(rule(values))
    return problems


def _even_head(v: Values) -> Iterator[str]:
    size = v["model.head_size"]
    if size > 1 and size % 2:
        yield (
            f"model.head_size = {size}: must be even, the rotary embedding turns pairs; "
            f"make it {size - 1} or {size + 1}"
        )


def _kv_heads(v: Values) -> Iterator[str]:
    heads, kv_heads = v["model.num_heads"], v["model.num_kv_heads"]
    if heads > 0 and kv_heads > 0 and heads % kv_heads:
        fits = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        yield (
            f"model.num_kv_heads = {kv_heads}: must divide model.num_heads = {heads}; "
            f"choose one of {fits}"
        )


def _rope_scaling(v: Values) -> Iterator[str]:
    low, high = v["model.rope_scaling.low_freq_factor"], v["model.rope_scaling.high_freq_factor"]
    if low >= high:
        yield (
            f"model.rope_scaling.low_freq_factor = {low}: must be below "
            f"model.rope_scaling.high_freq_factor = {high}; published models use 1 and 4"
        )


def _context(v: Values) -> Iterator[str]:
    seq_len, longest = v["data.seq_len"], v["model.max_seq_len"]
    if seq_len > longest:
        yield (
            f"data.seq_len = {seq_len}: is longer than model.max_seq_len = {longest}; "
            "shorten the samples, or raise model.max_seq_len if the model is meant for it"
        )


def _mesh_sizes(v: Values) -> Iterator[str]:
    axes = ("data", "fsdp", "sequence", "tensor", "stage")
    sizes = {axis: v[f"mesh.{axis}"] for axis in axes}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            yield (
                f"mesh.{axis} = {size}: must be at least 1, or -1 for all the devices that are left"
            )
    rest = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        yield f"{' and '.join(rest)} are -1: only one axis can take the devices that are left"


def _accumulation(v: Values) -> Iterator[str]:
    batch, steps = v["data.global_batch_size"], v["train.accumulation_steps"]
    if batch < 1 or steps < 1:
        return
    if batch % steps:
        yield (
            f"data.global_batch_size = {batch}: must be a multiple of train.accumulation_steps = "
            f"{steps}; {_multiples(batch, steps)}"
        )
        return
    sizes = (v["mesh.data"], v["mesh.fsdp"])
    shards = max(sizes[0], 1) * max(sizes[1], 1)
    if (batch // steps) % shards:
        yield (
            f"data.global_batch_size = {batch}: each of {steps} microbatches is split over "
            f"mesh.data x mesh.fsdp = {shards} devices, so it must be a multiple of "
            f"{steps * shards}; {_multiples(batch, steps * shards)}"
        )


def _multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"make it {below} or {below + step}" if below else f"make it {step}"


def _paths(v: Values) -> Iterator[str]:
    names = [name.strip() for name in v["data.path"].split(",")]
    if not all(names):
        yield (
            f"data.path = {v['data.path']!r}: has an empty name; give a directory written by "
            "`llamajax prepare`, or several separated by single commas"
        )


def _weights(v: Values) -> Iterator[str]:
    weights, num_paths = v["data.weights"], len(v["data.path"].split(","))
    if weights is None:
        return
    if len(weights) != num_paths:
        yield (
            f"data.weights = {_list(weights)}: {len(weights)} weights for {num_paths} "
            "directories in data.path; give one for each, or none"
        )
    if any(w <= 0 for w in weights):
        yield f"data.weights = {_list(weights)}: each must be above 0; leave the directory out"


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


def _remat_names(v: Values) -> Iterator[str]:
    for key in ("train.remat_keep", "train.remat_offload"):
        for name in v[key]:
            if name not in REMAT_NAMES:
                hint = did_you_mean(nearest(name, REMAT_NAMES)) or "."
                yield f"{key}: unknown tensor {name!r}{hint} They are {', '.join(REMAT_NAMES)}"
        if v[key] and v["train.remat"] in ("none", "dots"):
            yield (
                f"{key} = {','.join(v[key])}: train.remat = {v['train.remat']} keeps more than "
                "names can say; set train.remat to full, save_attention or save_qkv"
            )


def _init_from(v: Values) -> Iterator[str]:
    if v["train.init_from"] is not None and not v["train.init_from"].strip():
        yield "train.init_from = '': is empty; name a directory of weights, or set it to none"


def _continuation(v: Values) -> Iterator[str]:
    step = v["train.resume_step"]
    if step is not None and v["train.restart"]:
        yield f"train.resume_step = {step} and train.restart = true: choose one of the two"


def _directory(v: Values) -> Iterator[str]:
    directory = v["checkpoint.directory"]
    if directory is None:
        return
    if not directory.strip():
        yield "checkpoint.directory = '': is empty; name a directory, or set it to none"
    elif "://" in directory and not _GS_FOLDER.fullmatch(directory):
        yield (
            f"checkpoint.directory = {directory}: is not a path, nor gs://BUCKET/FOLDER without "
            "*?[] (of URLs, Orbax takes gs:// only)"
        )


def _lora_base(v: Values) -> Iterator[str]:
    if v["lora.rank"] > 0 and v["train.init_from"] is None:
        yield (
            f"lora.rank = {v['lora.rank']}: adapters need weights to adapt; set train.init_from "
            "to their directory, or lora.rank to 0 to train all weights"
        )


def _lora_targets(v: Values) -> Iterator[str]:
    targets = v["lora.targets"]
    for name in dict.fromkeys(targets):
        if name not in LORA_TARGETS:
            hint = did_you_mean(nearest(name, LORA_TARGETS)) or "."
            yield f"lora.targets: unknown matrix {name!r}{hint} They are {', '.join(LORA_TARGETS)}"
        elif targets.count(name) > 1:
            yield f"lora.targets: {name} is there {targets.count(name)} times; name it once"
    if not targets and v["lora.rank"] > 0:
        yield f"lora.targets: is empty; name some of {', '.join(LORA_TARGETS)}"


def _lora_rank(v: Values) -> Iterator[str]:
    keys = {"D": "hidden_size", "N": "num_heads", "K": "num_kv_heads", "H": "head_size"}
    keys["F"] = "intermediate_size"
    sizes = {}
    for target in v["lora.targets"]:
        for letters in LORA_TARGETS.get(target, ()):
            sizes[target, letters] = math.prod(v[f"model.{keys[letter]}"] for letter in letters)
    least = min(sizes, key=sizes.__getitem__, default=None)
    if least is not None and v["lora.rank"] > sizes[least] > 0:
        yield (
            f"lora.rank = {v['lora.rank']}: is more than {sizes[least]}, the smaller dimension of "
            f"the {least[0]} matrix, which has no higher rank; make it at most {sizes[least]}"
        )


def _plugin(v: Values) -> Iterator[str]:
    name = v["backend.name"]
    for key in ("plugin", "options"):
        value = v[f"backend.{key}"]
        if value is not None and name is None:
            yield f"backend.{key} = {value}: needs backend.name, the plugin's platform"
    if name is not None and not name.strip():
        yield f"backend.name = {name!r}: is empty; name a platform, or set it to none"
    for key, instead in (("repairs", "auto, none or names"), ("compile_cache", "auto or none")):
        value = v[f"backend.{key}"]
        if value is not None and not value.strip():
            yield f"backend.{key} = {value!r}: is empty; write {instead}"


def _spikes(v: Values) -> Iterator[str]:
    factor = v["guard.spike_factor"]
    if factor is not None and v["guard.nonfinite"] == "off":
        yield (
            f"guard.spike_factor = {factor}: needs guard.nonfinite = skip or stop, as a loss that "
            "is not finite would enter the median"
        )


def _plugin_options(v: Values) -> Iterator[str]:
    if v["backend.options"] is None:
        return
    for part in v["backend.options"].split(","):
        name, equals, _ = part.partition("=")
        if not name.strip() or not equals:
            yield f"backend.options = {v['backend.options']}: {part!r} is not k=v; write k=v,k=v"


def _processes(v: Values) -> Iterator[str]:
    names = ("coordinator_address", "num_processes", "process_id")
    given = {f"backend.{name}": v[f"backend.{name}"] for name in names}
    missing = [path for path, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        present = ", ".join(f"{p} = {x}" for p, x in given.items() if x is not None)
        yield f"{present}: needs {' and '.join(missing)} as well; set all three or none"
        return
    address, count, rank = given.values()
    if rank >= count > 0:
        yield (
            f"backend.process_id = {rank}: must be below backend.num_processes = {count}; "
            f"ranks go from 0 to {count - 1}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        yield f"backend.coordinator_address = {address}: is not HOST:PORT, e.g. node0:8476"


def _list(items: tuple[float, ...]) -> str:
    return ",".join(f"{item:g}" for item in items)


_RULES = (
    _even_head, _kv_heads, _rope_scaling, _context, _mesh_sizes, _accumulation, _paths, _weights,
    _warmup, _decay, _final_rate, _remat_names, _init_from, _continuation, _lora_base,
    _lora_targets, _lora_rank, _directory, _spikes, _plugin, _plugin_options, _processes,
)  # fmt: skip
