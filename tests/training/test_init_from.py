"""`train.init_from`: the first loss is that of the weights, and what does not fit is named."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import jax
import llama_cases
import llamas
import numpy as np
import pytest
from meshes import mesh_of
from refusal import refused
from workdirs import logged, prepare_texts

from llamajax import data
from llamajax.checkpoint import open_checkpoint, restore_state
from llamajax.checkpoint.restore import model_differences
from llamajax.config.model_schema import RopeScaling
from llamajax.models.abstract import abstract_model
from llamajax.training.initial_state import open_initial_weights

UNMASKED = {"data__mask_documents": False}


@pytest.fixture(scope="module")
def hugging_face(short_config, tmp_path_factory) -> Path:
    """Weights of the tiny architecture, with large differences between them."""
    model = short_config(train__steps=3).model
    folder = tmp_path_factory.mktemp("hugging_face")
    return llama_cases.save_hugging_face(folder, model, llama_cases.weights(model))


@pytest.mark.parametrize("by", ["llamajax", pytest.param("transformers", marks=pytest.mark.live)])
def test_the_first_loss_is_that_of_the_weights(
    short_run, short_config, hugging_face, tmp_path, by, request
):
    options = {"train__init_from": str(hugging_face), "train__steps": 3} | UNMASKED
    assert short_run(tmp_path, **options) == 0
    batch = first_batch(short_config(**options))
    if by == "llamajax":
        logits = llamas.logits(llamas.load(hugging_face), batch["tokens"])
    else:
        live = request.getfixturevalue("live")
        model = live.transformers.LlamaForCausalLM.from_pretrained(hugging_face)
        logits = live.logits(model, batch["tokens"].astype(np.int64))
    logits = logits.astype(np.float64)
    chosen = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    nll = np.log(np.exp(logits).sum(axis=-1)) - chosen
    first = logged(tmp_path)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(nll[batch["loss_mask"]].mean(), rel=1e-5)


def first_batch(config) -> dict[str, np.ndarray]:
    mixture = data.open_mixture(config.data, split="train", vocab_size=config.model.vocab_size)
    position = data.Position.start(
        batch_size=config.data.global_batch_size,
        seq_len=config.data.seq_len,
        mixture_hash=mixture.hash,
    )
    options = {"rows": range, "num_threads": 1, "prefetch": 1}
    return next(data.train_batches({mixture.hash: mixture}, position, first_step=0, **options))


def test_weights_of_ours_are_taken_bit_by_bit_and_once(base, short_run, short_config, tmp_path):
    source, target = shutil.copytree(base, tmp_path / "source"), tmp_path / "target"
    options = {"train__init_from": str(source), "train__steps": 4}
    config = short_config(**options)
    mesh = mesh_of(fsdp=4, tensor=2)
    weights = open_initial_weights(config, None)
    assert weights.tokenizer == source / "tokenizer" / "tokenizer.byte"
    loaded = weights.load(abstract_model(config.model, mesh))
    checkpoint = open_checkpoint(source / "checkpoints" / "3")
    saved = restore_state(checkpoint, {"model": abstract_model(config.model, mesh)}, partial=True)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved["model"]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert short_run(target, stop_after=2, **options) == 143
    shutil.rmtree(source)  # a rerun has its own checkpoints
    assert short_run(target, **options) == 0
    found = [row for row in logged(target) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[0]["learning_rate"] < found[2]["learning_rate"]  # warm-up began anew


def test_every_mismatch_is_named(short_config, hugging_face):
    other = {
        "model__vocab_size": 300,
        "model__hidden_size": 32,
        "model__num_layers": 2,
        "model__num_kv_heads": 6,
        "model__rope_theta": 10_000.0,
        "model__norm_eps": 1e-6,
        "model__tie_embeddings": True,
        "model__max_seq_len": 4096,
        "model__init_std": 0.5,
    }
    config = short_config(train__init_from=str(hugging_face), train__steps=3, **other)
    with refused("this run 32; use --config.model.hidden_size=48") as lines:
        open_initial_weights(config, None)
    found = {line.strip(" -").partition(":")[0] for line in lines[1:]}
    named = {key.replace("__", ".") for key in other}
    harmless = {"model.max_seq_len", "model.init_std"}
    assert found == named - harmless


def test_a_longer_context_begins_from_unscaled_weights(short_config, hugging_face, tmp_path):
    """The reverse, a run without the scaling that its weights need, is refused."""
    options = {"train__init_from": str(hugging_face), "train__steps": 3}
    longer = {"model__rope_scaling__type": "linear", "model__rope_scaling__factor": 2.0}
    assert open_initial_weights(short_config(**options, **longer), None).model.rope_scaling is None
    source = Path(shutil.copytree(hugging_face, tmp_path / "source"))
    llamas.edit_config(source, rope_scaling={"type": "linear", "factor": 2.0})
    with refused("model.rope_scaling: the weights have linear (factor=2.0), this run none; use"):
        open_initial_weights(short_config(**options | {"train__init_from": str(source)}), None)


ROPES = [
    {},
    {"type": "linear", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16, "beta_fast": 8.0},
    {"type": "llama3", "factor": 8.0, "original_max_seq_len": 16, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0},
]


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(ROPES, 2)))
def test_what_another_rope_scaling_is_told_to_use_works(short_config, old, new):
    """The flags give that of the weights; the stage gives the run's own from then on."""

    def model(scaling, **keys):
        scaled = {f"model.rope_scaling.{name}": value for name, value in scaling.items()}
        return short_config(train__steps=3, **scaled | keys).model

    sections = [dataclasses.asdict(model(scaling)) for scaling in (old, new)]
    (line,) = model_differences(*sections, step=2)
    fix, _, stage = line.partition("; to change it from step 2 on, also add ")
    flags = dict(re.findall(r"--config\.(\S+)=(\S+)", fix))
    if old:
        assert model(new, **flags) == model(old)
    else:
        assert flags == {"model.rope_scaling": "none"}
    if new:
        stages = f"[{stage.removesuffix(' to data.stages')}]"
        (stage,) = short_config(train__steps=3, data__stages=stages).data.stages
        assert (stage.from_step, stage.rope_scaling) == (2, model(new).rope_scaling)
    else:
        assert not stage


def test_a_record_without_newer_keys_of_rope_scaling_is_the_same_model():
    """As runs of Llama 3.1 wrote it that had no other type."""
    old = {name: value for name, value in ROPES[-1].items() if name != "type"}
    now = dataclasses.asdict(RopeScaling(**ROPES[-1]))
    assert model_differences({"rope_scaling": old}, {"rope_scaling": now}) == []


def test_an_epsilon_in_float32_is_the_same(short_config):
    model = short_config(train__steps=3).model
    stored = dataclasses.replace(model, norm_eps=float(np.float32(model.norm_eps)))
    assert stored != model
    assert model_differences(*map(dataclasses.asdict, (stored, model))) == []


def test_another_tokenizer_is_refused(short_config, hugging_face, tmp_path):
    """The weights were trained on pieces, and the data are bytes."""
    texts = (f"{'abcdefgh' * (i % 7)} line {i} of a small corpus." for i in range(99))
    other = prepare_texts(tmp_path, texts, tokenizer="train:300")
    source = Path(shutil.copytree(hugging_face, tmp_path / "source"))
    shutil.copy(other / "tokenizer.model", source)
    config = short_config(train__init_from=str(source), train__steps=3)
    fix = f"--tokenizer={source / 'tokenizer.model'}"
    with refused("was prepared with another tokenizer", fix):
        open_initial_weights(config, None)


def test_what_holds_no_weights_is_refused(short_config, tmp_path):
    for path, words in ((tmp_path / "nothing", "no such"), (tmp_path, "holds no weights")):
        config = short_config(train__init_from=str(path), train__steps=3)
        with refused(words, f"train.init_from = {path}"):
            open_initial_weights(config, None)
