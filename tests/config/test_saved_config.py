"""A run as JSON and back; what changed between two runs."""

import json

from refusal import refused

from llamajax.config import common_values, diff, freeze, from_json_dict, load, preset, to_json_dict
from llamajax.config.keys import all_keys
from llamajax.config.saved_config import PER_PROCESS
from llamajax.config.values import show


def test_json_round_trip_is_exact(valid):
    valid.model = preset("llama3.1-8b")
    valid.data.path, valid.data.weights = "a,b", (1 / 3, 2 / 3)
    valid.optim.epsilon = 1e-8
    run = freeze(valid)
    text = json.dumps(to_json_dict(run), allow_nan=False)
    assert from_json_dict(json.loads(text)) == run


def test_a_record_lacking_a_newer_key_takes_its_default(valid):
    tree = to_json_dict(freeze(valid))
    del tree["train"]["z_loss"]
    del tree["monitoring"]
    assert from_json_dict(tree) == freeze(valid)


def test_a_damaged_record_names_every_problem(valid):
    tree = to_json_dict(freeze(valid))
    tree["train"]["steps"] = "x"
    tree["optim"]["beta9"] = 1
    with refused("runs/x/config.json ") as lines:
        from_json_dict(tree, source="runs/x/config.json")
    assert len(lines) == 1 + 2


def test_diff_names_changed_paths_in_order(config_file):
    path = config_file()
    old = load(path)
    assert diff(old, old) == {}
    new = load(path, {"train.steps": "200", "data.seed": "1"})
    assert list(diff(old, new).items()) == [
        ("data.seed", ("0", "1")),
        ("optim.warmup_steps", ("10", "20")),
        ("train.steps", ("100", "200")),
    ]


def test_diff_names_the_keys_inside_rope_scaling(valid):
    valid.model = preset("llama3.1-8b")
    scaled = freeze(valid)
    valid.model.rope_scaling.factor = 32.0
    assert diff(scaled, freeze(valid)) == {"model.rope_scaling.factor": ("8.0", "32.0")}
    valid.model.rope_scaling = None
    changed = diff(scaled, freeze(valid))
    assert len(changed) == 8
    assert all(path.startswith("model.rope_scaling.") for path in changed)


def test_keys_that_may_differ_between_processes_exist(valid):
    assert set(PER_PROCESS) < set(all_keys())
    values = common_values(freeze(valid))
    assert not set(PER_PROCESS) & set(values)
    assert values["optim.learning_rate"] == show(valid.optim.learning_rate)
