"""Config files and overrides: what is read, and every problem at once."""

import copy

import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from refusal import refused

from llamajax.config import freeze, load, new_config
from llamajax.config.keys import all_keys
from llamajax.config.values import NOT_SET
from llamajax.errors import UserError


def problems_of(path: str, overrides: dict | None = None) -> list[str]:
    """The listed problems of a load that must fail."""
    with refused() as lines:
        load(path, overrides)
    return [line.removeprefix("  - ") for line in lines[1:]]


def test_a_valid_file_is_frozen_with_its_defaults(config_file):
    run = load(config_file())
    assert (run.model.name, run.optim.warmup_steps, run.mesh.fsdp) == ("tiny", 10, 1)
    assert run.data.weights is None
    assert isinstance(run.optim.clip_norm, float)
    assert load(config_file() + ":bench-32m").model.num_layers == 8  # an argument


def test_overrides_are_text_or_values_and_repair_the_file(config_file):
    run = load(config_file(), {"data.seq_len": "32", "train.seed": 7, "optim.clip_norm": "none"})
    assert (run.data.seq_len, run.train.seed, run.optim.clip_norm) == (32, 7, None)
    assert load(config_file("config.data.seq_len = 'x'"), {"data.seq_len": "16"}).data.seq_len == 16
    # A derived value follows an override, unless it is overridden itself.
    for keys, warmup in (({}, 100), ({"optim.warmup_steps": "3"}, 3)):
        run = load(config_file(), {"train.steps": "1_000"} | keys)
        assert run.optim.warmup_steps == warmup


def test_rope_scaling_is_built_cleared_and_changed_by_overrides(config_file):
    keys = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 64}
    overrides = {f"model.rope_scaling.{name}": str(value) for name, value in keys.items()}
    scaling = load(config_file(), overrides).model.rope_scaling
    assert (scaling.factor, scaling.original_max_seq_len) == (8.0, 64)
    path = config_file() + ":llama3.1-8b"
    assert load(path, {"model.rope_scaling": "none"}).model.rope_scaling is None
    assert load(path, {"model.rope_scaling.factor": "2"}).model.rope_scaling.factor == 2.0
    assert problems_of(config_file(), {"model.rope_scaling.factor": "8"}) == [
        "model.rope_scaling.type = llama3: needs model.rope_scaling.low_freq_factor and "
        "model.rope_scaling.high_freq_factor and model.rope_scaling.original_max_seq_len"
    ]
    keys = {"type": "yran", "factor": "0.5", "rope_type": "yarn"}
    found = problems_of(
        config_file(), {f"model.rope_scaling.{name}": x for name, x in keys.items()}
    )
    for fragment in (
        "type=yran: expected linear | llama3 | yarn, got 'yran' (str); did you mean yarn?",
        "factor = 0.5: must be at least 1",
        "rope_type: unknown key; did you mean model.rope_scaling.type?",
    ):
        assert f"model.rope_scaling.{fragment}" in found
    assert len(found) == 3


def test_every_problem_is_named_at_once(config_file):
    path = config_file(
        "config.optim.lerning_rate = 1.0\n"
        "config.trian.steps = 3\n"
        "config.learning_rate = 3\n"
        "config.nonsense = 3\n"
        "config.train.dtype = 'bfloat61'\n"
        "config.data.seed = 'zero'\n"
        "config.model.head_size = 9\n"
        "config.mesh = 8\n"
        "del config.data.seq_len"
    )
    overrides = {"train.stepz": "3", "train.log_every": "often", "steps": "3", "train": "x"}
    found = "\n".join(problems_of(path, overrides))
    for fragment in (
        "optim.lerning_rate: unknown key; did you mean optim.learning_rate?",
        "trian: unknown section; did you mean train?",
        "learning_rate: unknown key; did you mean optim.learning_rate?",
        "nonsense: unknown section; did you mean one of model, mesh, data,",
        "train.dtype: expected bfloat16 | float32 | float8, got 'bfloat61' (str); did you mean"
        " bfloat16?",
        "data.seed: expected int, got 'zero' (str)",
        "model.head_size = 9: must be even",
        "mesh: a section with keys, got 8",
        "data.seq_len: not set (int: T: tokens per sample",
        "train.stepz: unknown key; did you mean train.steps?",
        "train.log_every=often: expected int, got 'often'",
        "steps: unknown key; did you mean train.steps?",
        "train: names a section; set one of its keys, e.g. train.steps",
    ):
        assert fragment in found
    assert len(found.splitlines()) == 13


def test_a_mistyped_flag_is_not_also_reported_as_missing(config_file):
    found = problems_of(config_file("del config.data.seq_len"), {"data.seq_len": "x"})
    assert found == ["data.seq_len=x: expected int, got 'x' (str)"]


def test_an_empty_config_names_every_required_key(config_file):
    source = "from llamajax.config import new_config\nget_config = new_config\n"
    found = problems_of(config_file(source=source))
    required = [path for path, key in all_keys().items() if key.default is NOT_SET]
    assert [line.partition(":")[0] for line in found] == [
        path for path in required if path.count(".") == 1
    ]
    assert len(required) > 20


def test_a_config_dict_of_ones_own_works_too(valid):
    tree = valid.to_dict()
    tree["optim"]["warmup_steps"] = 3
    expected = freeze(valid)
    for own in (ConfigDict(tree), ConfigDict(tree).lock(), FrozenConfigDict(tree)):
        run = freeze(own)
        assert run.model == expected.model
        assert run.optim.warmup_steps == 3


def test_a_locked_type_safe_config_takes_overrides(config_file):
    source = (
        "import ml_collections\nfrom llamajax.config import new_config, preset\n"
        "def get_config():\n"
        "    config = new_config()\n    config.model = preset('tiny')\n"
        "    return ml_collections.FrozenConfigDict(config.to_dict())\n"
    )
    found = problems_of(config_file(source=source), {"train.steps": "5", "optim.clip_norm": "none"})
    assert not [line for line in found if "steps: not" in line and line.startswith("train")]
    assert not [line for line in found if line.startswith("optim.clip_norm")]


def test_a_failing_derivation_is_named_by_its_key(config_file):
    found = problems_of(config_file(), {"model.num_heads": "1", "train.steps": "0"})
    assert found[0].startswith("train.steps = 0")
    path = config_file("config.data.global_batch_size = 8 // config.train.get_ref('steps')")
    with refused("data.global_batch_size: cannot be computed"):
        load(path, {"train.steps": "0"})


def test_drafts_can_be_copied_and_printed(valid):
    assert "not set" in repr(new_config().to_dict())
    assert str(valid)
    assert freeze(copy.deepcopy(valid)) == freeze(valid)
    assert copy.deepcopy(new_config()).train.steps is NOT_SET


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        ("def get_config(:\n", [", line 1: not Python: ", "def get_config(:"]),
        ("x = 1\ny = x / 0\n", [", line 2: ZeroDivisionError: division by zero", "y = x / 0"]),
        ("import nosuchmodule\n", [", line 1: ModuleNotFoundError: No module named"]),
        ("import sys\nsys.exit(3)\n", [", line 2: SystemExit: 3"]),
        ("def get_confg():\n    pass\n", ["no function get_config(); rename get_confg"]),
        ("", ["defines no function get_config()"]),
        ("def get_config():\n    pass\n", ["got NoneType; does it end in `return config`?"]),
        ("def get_config():\n    return {}\n", ["must return a ConfigDict, got dict"]),
        ("get_config = dict\n", ["get_config must be a function"]),
        ("def get_config(size):\n    pass\n", ["needs an argument: --config=", ".py:SIZE"]),
        (
            "from llamajax.config import preset\n\ndef get_config():\n    preset('lama2-7b')\n",
            [", line 4: unknown preset 'lama2-7b'; did you mean llama2-7b?"],
        ),
        (
            "from llamajax.config import new_config\n"
            "def get_config():\n    config = new_config()\n    return config.train.stepz\n",
            [", line 4: AttributeError: ", 'Did you mean "steps"'],
        ),
    ],
)
def test_mistakes_in_the_file_name_its_line(config_file, source, fragments):
    path = config_file(source=source)
    with refused(path, *fragments, "train.stepz: unknown key"):
        load(path, {"train.stepz": "3"})


@pytest.mark.parametrize("how", ["import sizes", "from . import sizes"])
def test_a_config_imports_the_files_beside_it(config_file, tmp_path, how):
    """Each its own, also where two folders have a file of one name."""
    for steps in (30, 40):
        (tmp_path / str(steps)).mkdir()
        config_file(source=f"STEPS = {steps}\n", name=f"{steps}/sizes.py")
        path = config_file(f"{how}\nconfig.train.steps = sizes.STEPS", name=f"{steps}/run.py")
        assert load(path).train.steps == steps
    broken = config_file(source="STEPS = 1\nSTEPS = x\n", name="40/sizes.py")
    with pytest.raises(UserError, match=f"{broken}, line 2: NameError: name 'x' is not defined"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain.py:3", "takes no argument; drop ':3'"),
        ("palin.py", r"no such config file; did you mean .*plain\.py\?"),
        ("configs/my_text.py", r"no such config file; did you mean my_text\?"),
        (".", "is a directory"),
        ("binary.py", r"binary\.py: cannot be read as a Python file"),
    ],
)
def test_files_that_cannot_be_run_are_refused(config_file, tmp_path, name, message):
    config_file(source="def get_config():\n    pass\n", name="plain.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=message):
        load(f"{tmp_path}/{name}")


def test_a_misspelt_name_of_a_packaged_config_gets_the_nearest():
    with pytest.raises(UserError, match=r"quickstrat:3: is no FILE.py, .* did you mean quickstart"):
        load("quickstrat:3")
