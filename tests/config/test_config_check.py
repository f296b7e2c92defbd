"""Constraints on keys: each violation names value, constraint and path; none hides another."""

import pytest
from refusal import refused

from llamajax.config import freeze
from llamajax.config.check import check
from llamajax.config.keys import all_keys, own_keys
from llamajax.config.model_schema import RopeScaling
from llamajax.config.values import show

BATCH = "data.global_batch_size = 8: "
LORA = {"lora.rank": 4, "train.init_from": "weights"}
TRIPLE = {
    "backend.coordinator_address": "node0:8476",
    "backend.num_processes": 2,
    "backend.process_id": 1,
}
MUON = {"optim.name": "muon", "optim.muon_learning_rate": None, "optim.chain": None}


def rope(kind: str, **keys) -> dict:
    """Keys of a scaling by 2 of that type, and these changed."""
    found = {name: key.default for name, key in own_keys(RopeScaling).items()}
    found |= {"type": kind, "factor": 2.0} | keys
    return {f"model.rope_scaling.{name}": value for name, value in found.items()}


FREQ_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
WRONG = [
    (rope("yarn"), "model.rope_scaling.type = yarn: needs model.rope_scaling.original_max_seq_len"),
    (
        rope("llama3", **FREQ_FACTORS),
        "type = llama3: needs model.rope_scaling.original_max_seq_len",
    ),
    (rope("linear", beta_slow=2.0), "beta_slow = 2.0: is of type yarn, not linear; set it to 1.0"),
    (
        rope("linear", original_max_seq_len=8),
        "= 8: is of type llama3 or yarn, not linear",
    ),
    (
        rope("yarn", original_max_seq_len=64, beta_slow=32.0),
        "beta_slow = 32.0: must be below model.rope_scaling.beta_fast = 32.0; 1 and 32 are usual",
    ),
    (
        rope("yarn", original_max_seq_len=16),
        "is longer than the context of model.rope_scaling, factor = 2 x original_max_seq_len = 16",
    ),
    ({"model.head_size": 9}, "model.head_size = 9: must be even"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads = 4: must divide model.num_heads = 6; choose"),
    ({"data.seq_len": 129}, "data.seq_len = 129: is longer than model.max_seq_len = 128"),
    (
        {"train.accumulation_steps": 3},
        f"{BATCH}must be a multiple of train.accumulation_steps = 3; make it 6 or 9",
    ),
    ({"mesh.data": 2, "mesh.fsdp": 8}, "= 16 devices, so it must be a multiple of 16; make it 16"),
    ({"mesh.fsdp": 8, "train.accumulation_steps": 2}, f"{BATCH}each of 2 microbatches is split"),
    ({"mesh.fsdp": -1, "mesh.data": -1}, "mesh.data and mesh.fsdp are -1: only one axis"),
    ({"mesh.fsdp": 0}, "mesh.fsdp = 0: must be at least 1, or -1"),
    (
        {"train.remat_keep": ("qvk",)},
        "remat_keep = qvk: unknown name 'qvk'; did you mean qkv?",
    ),
    ({"train.remat": "dots", "train.remat_offload": ("up",)}, "train.remat_offload = up: train.re"),
    ({"data.path": "a,,b"}, "data.path = a,,b: has an empty name"),
    ({"data.path": "a,b", "data.weights": (1.0,)}, "data.weights = 1: 1 weights for 2 directories"),
    ({"data.validation": {"a": "b,c"}}, "data.validation = a:b,c: a = 'b,c' must be one directory"),
    ({"train.sample_temperature": 1e-9}, "train.sample_temperature = 1e-09: must be 0 (the most"),
    ({"data.weights": ()}, "data.weights = : 0 weights for 1 directories"),
    ({"data.weights": (0.0,)}, "data.weights = 0: each must be above 0"),
    ({"optim.warmup_steps": 101}, "optim.warmup_steps = 101: is more than train.steps = 100"),
    ({"optim.decay_steps": 10}, "optim.decay_steps = 10: only optim.schedule = wsd takes it"),
    ({"optim.schedule": "wsd"}, "optim.decay_steps = none: optim.schedule = wsd needs it"),
    ({"optim.schedule": "wsd", "optim.decay_steps": 91}, "train.steps = 100; make it at most 90"),
    ({"optim.final_learning_rate": 0.1}, "= 0.1: is above the peak optim.learning_rate = 0.001"),
    (MUON | {"optim.muon_learning_rate": 0.1, "optim.name": "adamw"}, "is of optim.name = muon"),
    (
        MUON | {"optim.chain": "a:b"},
        "optim.chain = a:b and optim.name = muon: a chain is the whole",
    ),
    ({"train.init_from": " "}, "is empty; name a directory of weights, or set it to none"),
    ({"train.resume_step": 3, "train.restart": True}, "train.resume_step = 3 and train.restart"),
    ({"lora.rank": 8}, "lora.rank = 8: adapters need weights to adapt; set train.init_from"),
    (LORA | {"lora.rank": 21}, "lora.rank = 21: is more than 20, the smaller dimension of the key"),
    (LORA | {"lora.targets": ("querry",)}, "unknown name 'querry'; did you mean query?"),
    (LORA | {"lora.targets": ("up", "up")}, "lora.targets = up,up: up is there 2 times"),
    (LORA | {"lora.targets": ()}, "lora.targets: is empty"),
    ({"monitoring.sinks": ("wandb", "wandb")}, "wandb is there 2 times"),
    ({"monitoring.profile_steps": "5:3"}, "monitoring.profile_steps = 5:3: is not FIRST:LAST"),
    ({"monitoring.profile_steps": "1:3"}, "monitoring.profile_steps = 1:3: is not FIRST:LAST"),
    ({"train.fork": "runs/a"}, "train.fork = runs/a: is not RUN@STEP"),
    ({"monitoring.profile_steps": "99:101"}, "= 99:101: ends behind train.steps = 100; choose"),
    ({"checkpoint.directory": "az://a/b"}, "checkpoint.directory = az://a/b: is not a path"),
    ({"checkpoint.directory": "s3://a/"}, "checkpoint.directory = s3://a/: is not a path"),
    ({"guard.spike_factor": 5.0, "guard.nonfinite": "off"}, "guard.spike_factor = 5.0: needs"),
    ({"backend.plugin": "x.so"}, "backend.plugin = x.so: needs backend.name"),
    ({"backend.options": "a=b"}, "backend.options = a=b: needs backend.name"),
    ({"backend.name": "npu", "backend.options": "a"}, "backend.options = a: 'a' is not k=v"),
    ({"backend.name": ""}, 'backend.name = "": is empty'),
    ({"backend.process_id": 0}, "needs backend.coordinator_address and backend.num_processes"),
    (TRIPLE | {"backend.process_id": 2}, "backend.process_id = 2: must be below"),
    (TRIPLE | {"backend.coordinator_address": "node0:99999"}, "= node0:99999: is not HOST:PORT"),
    (TRIPLE | {"backend.coordinator_address": "tcp://a:8"}, "is not HOST:PORT, e.g. node0:8476"),
    (TRIPLE | {"backend.coordinator_address": "::1:8"}, "address is in brackets: [::1]:8"),
]
RIGHT = [
    rope("linear", factor=1.0),
    rope("yarn", original_max_seq_len=32, truncate=False, attention_factor=1.0),
    rope("llama3", original_max_seq_len=16, **FREQ_FACTORS),  # Llama 3.1: twice this context
    MUON | {"optim.muon_learning_rate": 0.1},
    {"data.seq_len": 128},
    {"mesh.data": -1, "mesh.fsdp": 4, "train.accumulation_steps": 2},
    {"optim.schedule": "wsd", "optim.decay_steps": 90},
    {"optim.schedule": "constant", "optim.final_learning_rate": 1.0},
    {"optim.beta1": 0.0, "optim.weight_decay": 0.0, "optim.clip_norm": None},
    {"data.path": "a, b", "data.weights": (1.0, 2.0)},
    {"backend.name": "npu", "backend.plugin": "x.so", "backend.options": "a=b,c="},
    {"checkpoint.every_steps": None, "checkpoint.every_minutes": None},
    {"checkpoint.directory": "gs://bucket/folder"},
    {"checkpoint.directory": "s3://bucket/folder/deeper/"},
    {"monitoring.profile_steps": "100:100"},
    LORA | {"lora.rank": 20},
    LORA | {"lora.rank": 48, "lora.targets": ("gate", "out")},
    TRIPLE,
]


@pytest.fixture
def values(valid) -> dict:
    """The values of a valid config by path."""
    return {f"{name}.{key}": value for name in valid for key, value in valid[name].items()}


def problems_of(values: dict) -> list[str]:
    """What is wrong with each value, and with several together."""
    alone = {path: all_keys()[path].problem_with(value) for path, value in values.items()}
    found = [f"{path} = {show(values[path])}: {text}" for path, text in alone.items() if text]
    return found + check({path: value for path, value in values.items() if not alone[path]})


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda x: "-".join(x) if x else "")
def test_a_violation_is_named_alone(values, changes, message):
    (problem,) = problems_of(values | changes)
    assert message in problem


@pytest.mark.parametrize("changes", RIGHT, ids=lambda x: "-".join(x))
def test_values_at_the_edge_are_taken(values, changes):
    assert problems_of(values | changes) == []


LIMITED = [k for k in all_keys().values() if (k.at_least, k.above) != (None, None)]


@pytest.mark.parametrize("key", LIMITED, ids=lambda key: key.path)
def test_numbers_out_of_range_are_refused(key):
    low = key.above if key.at_least is None else key.at_least - 1
    assert key.problem_with(low).startswith("must be a")
    assert not key.problem_with(1e-9 if key.at_least is None else key.at_least)
    if key.below is not None:
        assert key.problem_with(key.below) == f"must be at least 0 and below {key.below}"


def test_violations_do_not_hide_one_another(valid):
    valid.model.head_size, valid.optim.beta1 = 9, 1
    valid.train.log_every, valid.data.weights = "often", (1.0, 1.0)
    scaling = {"factor": 0.5, "low_freq_factor": 4, "high_freq_factor": 4}
    valid.model.rope_scaling = scaling | {"original_max_seq_len": 0}
    with refused(
        "7 problems in config",
        "train.log_every: expected",
        "optim.beta1 = 1.0: must be at least 0 and below 1",
        "model.head_size = 9",
        "data.weights",
        "low_freq_factor = 4.0: must be below",
        "factor = 0.5: must be at least 1",
        "original_max_seq_len = 0: must be at least 1",
    ):
        freeze(valid)
