"""Relations between keys: each violation names value, constraint and path; none hides another."""

import pytest

from llamajax.config import freeze
from llamajax.config.check import check
from llamajax.errors import UserError


def put(config, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        config = config[parent]
    config[name] = value


LORA = {"lora.rank": 4, "train.init_from": "weights"}
WRONG = [
    ({"model.head_size": 9}, "model.head_size = 9: must be even"),
    ({"model.head_size": 0}, "model.head_size = 0: must be at least 2"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads = 4: must divide model.num_heads = 6; choose"),
    ({"model.num_layers": 0}, "model.num_layers = 0: must be at least 1"),
    ({"model.rope_theta": 0}, "model.rope_theta = 0.0: must be above 0"),
    ({"model.norm_eps": -1e-5}, "model.norm_eps = -1e-05: must be above 0"),
    ({"data.seq_len": 129}, "data.seq_len = 129: is longer than model.max_seq_len = 128"),
    ({"data.global_batch_size": 0}, "data.global_batch_size = 0: must be at least 1"),
    (
        {"train.accumulation_steps": 3},
        "data.global_batch_size = 8: must be a multiple of train.accumulation_steps = 3; "
        "make it 6 or 9",
    ),
    (
        {"mesh.data": 2, "mesh.fsdp": 8},
        "mesh.data x mesh.fsdp = 16 devices, so it must be a multiple of 16; make it 16",
    ),
    (
        {"mesh.fsdp": 8, "train.accumulation_steps": 2},
        "each of 2 microbatches is split over mesh.data x mesh.fsdp = 8",
    ),
    ({"mesh.fsdp": -1, "mesh.data": -1}, "mesh.data and mesh.fsdp are -1: only one axis"),
    ({"mesh.fsdp": 0}, "mesh.fsdp = 0: must be at least 1, or -1"),
    ({"mesh.tensor": -2}, "mesh.tensor = -2: must be at least 1, or -1"),
    ({"train.remat_keep": ("qvk",)}, "train.remat_keep: unknown tensor 'qvk'; did you mean qkv?"),
    ({"train.remat": "dots", "train.remat_offload": ("up",)}, "train.remat_offload = up: train.re"),
    ({"mesh.sequence": 0}, "mesh.sequence = 0: must be at least 1"),
    ({"mesh.stage": -2}, "mesh.stage = -2: must be at least 1"),
    ({"data.path": "a,,b"}, "data.path = 'a,,b': has an empty name"),
    ({"data.path": ""}, "data.path = '': has an empty name"),
    (
        {"data.path": "a,b", "data.weights": (1.0,)},
        "data.weights = 1: 1 weights for 2 directories in data.path",
    ),
    ({"data.weights": (0.0,)}, "data.weights = 0: each must be above 0"),
    ({"data.seed": -1}, "data.seed = -1: must be at least 0 and below 4294967296"),
    ({"train.seed": 2**32}, "train.seed = 4294967296: must be at least 0 and below 4294967296"),
    ({"optim.warmup_steps": 101}, "optim.warmup_steps = 101: is more than train.steps = 100"),
    ({"optim.warmup_steps": -1}, "optim.warmup_steps = -1: must be at least 0"),
    ({"optim.decay_steps": 10}, "optim.decay_steps = 10: only optim.schedule = wsd takes it"),
    ({"optim.schedule": "wsd"}, "optim.decay_steps = none: optim.schedule = wsd needs it"),
    (
        {"optim.schedule": "wsd", "optim.decay_steps": 91},
        "optim.decay_steps = 91: with optim.warmup_steps = 10 it is more than train.steps = 100; "
        "make it at most 90",
    ),
    (
        {"optim.final_learning_rate": 0.1},
        "optim.final_learning_rate = 0.1: is above the peak optim.learning_rate = 0.001",
    ),
    ({"optim.learning_rate": 0}, "optim.learning_rate = 0.0: must be above 0"),
    ({"optim.beta1": 1.0}, "optim.beta1 = 1.0: must be at least 0 and below 1"),
    ({"optim.beta2": -0.1}, "optim.beta2 = -0.1: must be at least 0 and below 1"),
    ({"optim.epsilon": 0}, "optim.epsilon = 0.0: must be above 0"),
    ({"optim.weight_decay": -1}, "optim.weight_decay = -1.0: must be at least 0"),
    ({"optim.clip_norm": 0}, "optim.clip_norm = 0.0: must be above 0"),
    ({"train.steps": 0, "optim.warmup_steps": 0}, "train.steps = 0: must be at least 1"),
    ({"train.init_from": " "}, "train.init_from = '': is empty"),
    ({"train.eval_batches": 0}, "train.eval_batches = 0: must be at least 1"),
    ({"lora.rank": 8}, "lora.rank = 8: adapters need weights to adapt; set train.init_from"),
    ({"lora.rank": -1}, "lora.rank = -1: must be at least 0"),
    (LORA | {"lora.rank": 21}, "lora.rank = 21: is more than 20, the smaller dimension of the key"),
    (LORA | {"lora.alpha": 0}, "lora.alpha = 0.0: must be above 0"),
    (LORA | {"lora.dropout": 1}, "lora.dropout = 1.0: must be at least 0 and below 1"),
    (LORA | {"lora.dropout": -0.1}, "lora.dropout = -0.1: must be at least 0 and below 1"),
    (LORA | {"lora.targets": ("querry",)}, "unknown matrix 'querry'; did you mean query?"),
    (LORA | {"lora.targets": ("up", "up")}, "lora.targets: up is there 2 times"),
    (LORA | {"lora.targets": ()}, "lora.targets: is empty"),
    ({"checkpoint.export_hf_every": 0}, "checkpoint.export_hf_every = 0: must be at least 1"),
    ({"checkpoint.keep": 0}, "checkpoint.keep = 0: must be at least 1"),
    ({"checkpoint.every_minutes": 0}, "checkpoint.every_minutes = 0.0: must be above 0"),
    ({"backend.plugin": "x.so"}, "backend.plugin = x.so: needs backend.name"),
    ({"backend.options": "a=b"}, "backend.options = a=b: needs backend.name"),
    ({"backend.name": "npu", "backend.options": "a"}, "backend.options = a: 'a' is not k=v"),
    ({"backend.name": ""}, "backend.name = '': is empty"),
    (
        {"backend.process_id": 0},
        "backend.process_id = 0: needs backend.coordinator_address and backend.num_processes",
    ),
]
TRIPLE = {
    "backend.coordinator_address": "node0:8476",
    "backend.num_processes": 2,
    "backend.process_id": 1,
}
WRONG += [
    (TRIPLE | {"backend.process_id": 2}, "backend.process_id = 2: must be below"),
    (TRIPLE | {"backend.coordinator_address": "node0"}, "= node0: is not HOST:PORT"),
    (TRIPLE | {"backend.coordinator_address": "node0:99999"}, "is not HOST:PORT"),
]
RIGHT = [
    {"data.seq_len": 128},
    {"mesh.data": -1, "mesh.fsdp": 4, "train.accumulation_steps": 2},
    {"optim.schedule": "wsd", "optim.decay_steps": 90},
    {"optim.schedule": "constant", "optim.final_learning_rate": 1.0},
    {"optim.beta1": 0.0, "optim.weight_decay": 0.0, "optim.clip_norm": None},
    {"data.path": "a, b", "data.weights": (1.0, 2.0)},
    {"backend.name": "npu", "backend.plugin": "x.so", "backend.options": "a=b,c="},
    {"checkpoint.every_steps": None, "checkpoint.every_minutes": None},
    {"train.init_from": "weights"},
    LORA | {"lora.rank": 20},
    LORA | {"lora.rank": 48, "lora.targets": ("gate", "out")},
    TRIPLE,
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda x: "-".join(x) if x else "")
def test_a_violation_is_named_alone(valid, changes, message):
    for path, value in changes.items():
        put(valid, path, value)
    with pytest.raises(UserError) as caught:
        freeze(valid)
    problems = str(caught.value).splitlines()[1:]
    assert message in problems[0]
    assert len(problems) == 1


@pytest.mark.parametrize("changes", RIGHT, ids=lambda x: "-".join(x))
def test_values_at_the_edge_are_taken(valid, changes):
    for path, value in changes.items():
        put(valid, path, value)
    freeze(valid)


def test_violations_do_not_hide_one_another(valid):
    put(valid, "model.head_size", 9)
    put(valid, "optim.beta1", 1)
    put(valid, "train.log_every", "often")
    put(valid, "data.weights", (1.0, 1.0))
    with pytest.raises(UserError, match="4 problems in config") as caught:
        freeze(valid)
    for path in ("train.log_every: expected", "optim.beta1", "model.head_size", "data.weights"):
        assert path in str(caught.value)


def test_a_rule_without_its_values_is_passed_over():
    assert check({}) == []
    assert check({"model.head_size": 9})[0].startswith("model.head_size = 9")


def test_low_and_high_frequency_factors_are_ordered(valid):
    scaling = {"factor": 0.5, "low_freq_factor": 4, "high_freq_factor": 4}
    valid.model.rope_scaling = scaling | {"original_max_seq_len": 0}
    with pytest.raises(UserError) as caught:
        freeze(valid)
    assert "low_freq_factor = 4.0: must be below" in str(caught.value)
    assert "factor = 0.5: must be at least 1" in str(caught.value)
    assert "original_max_seq_len = 0: must be at least 1" in str(caught.value)
