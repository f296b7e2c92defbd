"""Runs that train adapters: what they save, how they resume, what leaves them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import load_file
from workdirs import logged

from llamajax.checkpoint import open_checkpoint
from llamajax.formats.llama_sources import read_factors
from llamajax.formats.weights import open_base, open_weights
from llamajax.training.initial_state import open_initial_weights

MATRICES = {"lora__targets": "query,out,down"}
LORA = {"lora__rank": 3, "lora__alpha": 6.0, "lora__dropout": 0.1, **MATRICES}
STEPS = {"train__steps": 6, "optim__learning_rate": 0.02}


@pytest.fixture(scope="module")
def adapted(short_run, base, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("adapted")
    export = {"checkpoint__export_hf_every": 4, "train__base_model": "my/base"}
    assert short_run(workdir, train__init_from=str(base), **LORA, **STEPS, **export) == 0
    return workdir


def test_a_checkpoint_holds_adapters_and_names_their_base(adapted, base):
    names = list(open_checkpoint(adapted / "checkpoints" / "6").arrays)
    assert not [name for name in names if name.startswith("model/")]
    assert len([name for name in names if name.startswith("adapters/")]) == 6
    meta = json.loads((adapted / "checkpoints" / "6" / "meta.json").read_text())
    assert meta["base"]["path"] == str(base / "checkpoints" / "3")


def test_reading_it_gives_the_merged_model(adapted, base, loaded):
    before, after = loaded(base), loaded(adapted)
    factors = read_factors(open_checkpoint(adapted / "checkpoints" / "6"))
    for name, value in after.items():
        target = next((t for t in factors if f".{t}" in name), None)
        if target is None:
            np.testing.assert_array_equal(value, before[name])
            continue
        a, b = factors[target].a.astype(float), factors[target].b.astype(float)
        added = np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
        assert np.abs(added).max() > 1e-3
        np.testing.assert_allclose(value, before[name] + 2.0 * added, rtol=0, atol=1e-6)


def test_it_exports_what_it_is(adapted, loaded):
    assert sorted(path.name for path in (adapted / "hf").iterdir()) == ["4", "6"]
    merged = loaded(adapted)
    for name, value in loaded(adapted / "hf" / "6").items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6, err_msg=name)
    assert open_weights(adapted / "hf" / "6").tokenizer is not None
    rows = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "tokens_seen" in row]
    for folder, last in ((adapted / "hf" / "4", 4), (adapted / "peft", 6)):
        card = (folder / "README.md").read_text("utf-8")
        row = max((r for r in trained if r["step"] <= last), key=lambda r: r["step"])
        assert 'base_model: "my/base"\n' in card
        assert f"| updates | {last} |\n| adapters | rank 3 on query, out, down |\n" in card
        assert f"| tokens seen | {row['tokens_seen']:,} at step {row['step']} |" in card
        assert f"| training loss | {row['loss']:.4f} |" in card
        assert str(adapted.parent) not in card


def test_peft_has_the_factors_under_its_own_names(adapted, base, loaded):
    config = json.loads((adapted / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert config["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert config["base_model_name_or_path"] == "my/base"
    tensors = load_file(adapted / "peft" / "adapter_model.safetensors")
    ours = read_factors(open_checkpoint(adapted / "checkpoints" / "6"))["out"]
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    np.testing.assert_array_equal(a.T.reshape(ours.a[0].shape), ours.a[0])
    np.testing.assert_array_equal(b.T, ours.b[0])
    assert len(tensors) == 6
    merged = loaded(adapted)  # PEFT's directory is read back, whatever kind and name its base has
    for name, value in loaded(adapted / "peft").items():
        np.testing.assert_array_equal(value, merged[name], err_msg=name)
    assert "warning" not in (adapted / "train.log").read_text("utf-8")


def test_with_another_rope_scaling_than_its_base_it_says_so_and_writes_no_peft(
    short_run, base, tmp_path
):
    options = {"train__init_from": str(base), **LORA, "train__steps": 3}
    options |= {"model__rope_scaling__type": "linear", "model__rope_scaling__factor": 2.0}
    changed = "the weights have no rope_scaling; this run trains them on with linear (factor=2.0)"
    for stop_after, code in ((1, 143), (None, 0)):
        assert short_run(tmp_path, stop_after=stop_after, **options) == code
        facts = json.loads((tmp_path / "run.json").read_text())
        assert facts["rope_scaling_changed"] == changed  # also after a rerun
    log = (tmp_path / "train.log").read_text("utf-8")
    assert log.count(f"warning: {changed}\n") == 1
    assert "peft is not written: the adapters were trained with rope_scaling linear" in log
    assert not (tmp_path / "peft").exists()


def test_an_interrupted_run_continues_bit_by_bit(short_run, adapted, base, tmp_path):
    options = {"train__init_from": str(base), **LORA, **STEPS}
    assert short_run(tmp_path, stop_after=4, **options) == 143
    assert not (tmp_path / "peft").exists()
    assert short_run(tmp_path, **options) == 0
    log = (tmp_path / "train.log").read_text("utf-8")
    assert "which PEFT cannot load, as it is no Hugging Face directory" in log
    assert logged(tmp_path) == logged(adapted)
    ours, theirs = (
        read_factors(open_checkpoint(path / "checkpoints" / "6")) for path in (tmp_path, adapted)
    )
    for target, factors in theirs.items():
        np.testing.assert_array_equal(ours[target].a, factors.a)
        np.testing.assert_array_equal(ours[target].b, factors.b)


def test_other_adapters_do_not_continue(short_run, adapted, base):
    with refused("lora.alpha: it was 6.0, now it is 3.0"):
        short_run(adapted, train__init_from=str(base), **(LORA | STEPS | {"lora__alpha": 3.0}))
    with refused("lora.rank: it was 3, now it is 0"):
        short_run(adapted, train__init_from=str(base), **STEPS)


def test_the_base_may_move_but_not_change(short_config, adapted, base, tmp_path):
    meta = open_checkpoint(adapted / "checkpoints" / "6").meta
    moved = shutil.copytree(base, tmp_path / "moved")
    config = short_config(train__init_from=str(moved), **LORA, **STEPS)
    assert open_initial_weights(config, meta).path == moved / "checkpoints" / "3"
    shutil.rmtree(moved / "checkpoints" / "3")  # the one of step 2 is left
    with refused("has other weights than those"):
        open_initial_weights(config, meta)
    shutil.rmtree(moved)
    with refused("are gone"):
        open_initial_weights(config, meta)


def test_a_workdir_without_its_base_cannot_be_read(adapted, tmp_path):
    meta = open_checkpoint(adapted / "checkpoints" / "6").meta["base"]
    meta = meta | {"path": str(tmp_path / "nowhere")}
    with refused("are gone: there is no ", "nowhere"):
        open_base(meta, path=None, adapters=adapted)
