"""Muon, 8-bit products, rounded moments and an average of weights in runs: stopped, resumed."""

import numpy as np
import pytest
from refusal import refused
from workdirs import logged, read_rows

from llamajax import convert
from llamajax.checkpoint import open_checkpoint

DECAY = 0.2
RECIPE = {"optim__name": "muon", "optim__moment_dtype": "bfloat16", "checkpoint__every_steps": 1}
RECIPE |= {"checkpoint__keep": 9, "train__steps": 4, "train__eval_every": 2, "optim__offload": True}
RECIPE |= {"train__dtype": "float8"}


def stored(workdir, step: int, part: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint under `part`, by the rest of their name."""
    checkpoint = open_checkpoint(workdir / "checkpoints" / str(step))
    return {
        name.removeprefix(part): checkpoint.array(name).read(
            tuple(slice(0, n) for n in leaf.shape), leaf.dtype
        )
        for name, leaf in checkpoint.arrays.items()
        if name.startswith(part)
    }


def assert_averages(workdir, steps, first: int) -> None:
    """The average of each step is what the weights of all steps since `first` say."""
    expected = {name: w.astype(np.float64) for name, w in stored(workdir, first, "model/").items()}
    for step in steps:
        part = 1 - min(DECAY, step / (9 + step))
        for name, weight in stored(workdir, step, "model/").items():
            expected[name] += part * (weight - expected[name])
        for name, average in stored(workdir, step, "average/").items():
            np.testing.assert_allclose(average, expected[name], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def plain(short_run, tmp_path_factory):
    """A run with Muon to step 4, and none of the averages."""
    workdir = tmp_path_factory.mktemp("plain")
    assert short_run(workdir, **RECIPE) == 0
    return workdir


@pytest.mark.slow
def test_a_run_with_an_average_stopped_and_resumed_trains_as_one_without(
    plain, short_run, tmp_path, loaded, capfd
):
    keys = RECIPE | {"optim__ema_decay": DECAY}
    workdir = tmp_path / "run"
    assert short_run(workdir, **keys, stop_after=2) == 143
    assert short_run(workdir, **keys) == 0
    assert logged(workdir) == logged(plain)
    for part in ("model/", "opt_state/"):
        ours, theirs = (stored(each, 4, part) for each in (workdir, plain))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    moments = [a.dtype.name for a in stored(plain, 4, "opt_state/").values() if a.ndim]
    assert set(moments) == {"bfloat16"}
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 < abs(row["ema_loss"] - row["eval_loss"]) < 1 for row in rows)
    assert not any("ema_loss" in row for row in read_rows(plain / "metrics.jsonl"))
    exported = tmp_path / "ema"
    convert.main([f"--from={workdir}", f"--to={exported}", "--dtype=float32", "--average=ema"])
    arrays = loaded(exported)
    for name, average in stored(workdir, 4, "average/").items():
        (key,) = (key for key in arrays if key.startswith("." + name.replace("/", ".")))
        np.testing.assert_array_equal(arrays[key], average)
    capfd.readouterr()
    with refused(f"{plain / 'checkpoints' / '4'} (llamajax) holds no average"):
        convert.main([f"--from={plain}", f"--to={tmp_path / 'none'}", "--average=ema"])


@pytest.mark.slow
def test_an_average_begins_and_ends_where_a_run_is_resumed(plain, short_run, capfd):
    assert short_run(plain, **RECIPE | {"train__steps": 6}, optim__ema_decay=DECAY) == 0
    assert "the average of the weights begins at those of step 4\n" in capfd.readouterr().err
    assert_averages(plain, (5, 6), 4)
    assert short_run(plain, **RECIPE | {"train__steps": 7}) == 0
    assert "the average of the weights ends with step 6: optim.ema_" in capfd.readouterr().err
    assert not stored(plain, 7, "average/")
