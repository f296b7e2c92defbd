"""Any weights are opened for what they are, onto any mesh, or refused with all that is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from llamas import BASE, assert_same, edit_config, mesh, random_model
from tiny_state import checkpointer

from llamajax.checkpoint.restore import open_checkpoint
from llamajax.errors import UserError
from llamajax.formats.huggingface.hf_write import export_hf
from llamajax.formats.llama_sources import CheckpointSource
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model

MESHES = [{}, {"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
MODEL = random_model(BASE)
META = {"config": {"model": dataclasses.asdict(BASE)}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    export_hf(MODEL, BASE, path, dtype="float32", tokenizer=None)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with checkpointer(path / "checkpoints") as saver:
        saver.save(3, {"model": random_model(BASE, seed=9), "opt_state": np.zeros(4)}, meta=META)
        saver.save(7, {"model": MODEL, "opt_state": np.zeros(4)}, meta=META)
    (path / "tokenizer.byte").write_text("bytes")
    return path


@pytest.fixture
def damaged(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


def cast(model, dtype):
    wanted = abstract_model(BASE, mesh(), dtype=dtype)
    flat = zip(*(jax.tree.leaves(m) for m in (model, wanted)), strict=True)
    return [np.asarray(a).astype(w.dtype) for a, w in flat]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["huggingface", "llamajax"])
def test_weights_reach_any_mesh(kind, dtype, axes, exported, workdir):
    weights = open_weights(exported if kind == "huggingface" else workdir)
    assert (weights.kind, weights.model) == (kind, BASE)
    wanted = abstract_model(BASE, mesh(**axes), dtype=dtype)
    loaded = weights.load(wanted)
    assert_same(jax.tree.leaves(loaded), cast(MODEL, dtype))
    assert [a.sharding for a in jax.tree.leaves(loaded)] == [
        a.sharding for a in jax.tree.leaves(wanted)
    ]


def test_a_run_is_opened_at_its_newest_step_and_a_step_at_itself(workdir):
    assert open_weights(workdir).step == 7
    assert open_weights(workdir / "checkpoints").step == 7
    earlier = open_weights(workdir / "checkpoints" / "3")
    assert (earlier.step, earlier.tokenizer) == (3, workdir / "tokenizer.byte")


def test_a_checkpoint_is_read_as_tensors_of_hugging_face(workdir, exported):
    model = abstract_model(BASE, mesh())
    sources = [open_weights(path).tensors(model) for path in (workdir, exported)]
    for name in sources[0].names():
        assert sources[0].read(name).tobytes() == sources[1].read(name).tobytes()


def test_a_damaged_checkpoint_is_refused(workdir, tmp_path):
    copy = Path(shutil.copytree(workdir / "checkpoints" / "7", tmp_path / "7"))
    file = max(copy.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    weights = open_weights(copy)
    with pytest.raises(UserError, match="checksum"):
        weights.load(abstract_model(BASE, mesh()))
    with pytest.raises(UserError, match="checksum"):
        CheckpointSource(open_checkpoint(copy), BASE, abstract_model(BASE, mesh()))


def test_another_architecture_is_not_filled(exported):
    other = dataclasses.replace(BASE, intermediate_size=46, tie_embeddings=True)
    with pytest.raises(UserError, match=r"blocks/mlp/gate(.|\n)*tie_embeddings is False"):
        open_weights(exported).load(abstract_model(other, mesh()))


def test_every_wrong_tensor_is_named_before_any_is_read(damaged):
    file = damaged / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    del arrays["model.norm.weight"]
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(np.int8)
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(UserError) as caught:
        open_weights(damaged)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "model.embed_tokens.weight" in lines[1]
    assert "int8" in lines[1]
    assert "model.norm.weight: missing" in lines[2]
    assert "[130, 24], the architecture [131, 24]" in lines[3]
    assert "q_proj.bias: not part" in lines[4]


def test_a_missing_shard_and_a_wrong_index_are_named(damaged):
    (damaged / "model.safetensors").rename(damaged / "one.safetensors")
    index = damaged / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"two\.safetensors is missing"):
        open_weights(damaged)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"a: .*does not hold it"):
        open_weights(damaged)
    index.write_text("[]")
    with pytest.raises(UserError, match="no weight_map"):
        open_weights(damaged)


def test_a_cut_file_is_named(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off"):
        open_weights(damaged)


def test_pickled_weights_are_refused(damaged):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, pickled"):
        open_weights(damaged)


def test_a_tied_head_may_be_there_but_not_differ(damaged):
    edit_config(damaged, tie_word_embeddings=True)
    tied = dataclasses.replace(BASE, tie_embeddings=True)
    wanted = abstract_model(tied, mesh())
    with pytest.raises(UserError, match=r"lm_head\.weight that differs"):
        open_weights(damaged).load(wanted)
    file = damaged / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(arrays, file)
    loaded = open_weights(damaged).load(wanted)
    assert loaded.head is None
    assert_same(loaded.embedding, MODEL.embedding)


@pytest.mark.parametrize("content", ["{", '{"model_type": "gpt2"}', '{"train": {}}'])
def test_what_is_no_llama_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"not readable as JSON|'gpt2' is not|holds no weights"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_weights(tmp_path / "nowhere")


def test_a_run_without_a_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="without a finished checkpoint"):
        open_weights(tmp_path)


def test_names_that_wrappers_of_torch_prefix_are_read(damaged, exported):
    file = damaged / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "base_model.model."):
        safetensors.numpy.save_file({prefix + n: a for n, a in arrays.items()}, file)
        assert open_weights(damaged).fingerprint() == open_weights(exported).fingerprint()


def test_two_names_of_one_weight_in_a_file_are_refused(damaged):
    file, name = damaged / "model.safetensors", "model.norm.weight"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays | {f"module.{name}": arrays[name] + 1}, file)
    with pytest.raises(UserError, match=rf"module\.{name}.* {name}, which .*{file.name} holds too"):
        open_weights(damaged)


def test_the_index_decides_between_two_copies_of_a_tensor(damaged, exported):
    file, name = damaged / "model.safetensors", "model.norm.weight"
    arrays = safetensors.numpy.load_file(file)
    wanted = open_weights(exported).fingerprint()
    rest = {n: a for n, a in arrays.items() if n != name}
    safetensors.numpy.save_file({name: arrays[name]}, damaged / "1.safetensors")
    safetensors.numpy.save_file(rest | {name: arrays[name] + 1}, damaged / "2.safetensors")
    file.unlink()
    weight_map = dict.fromkeys(rest, "2.safetensors") | {name: "1.safetensors"}
    index = damaged / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert open_weights(damaged).fingerprint() == wanted


def test_what_holds_no_weights_is_named(damaged, tmp_path):
    (damaged / "model.safetensors").unlink()
    (damaged / "training_args.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"there is neither model\.safetensors nor"):
        open_weights(damaged)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapters of PEFT alone"):
        open_weights(adapters)
    cache = tmp_path / "models--a--b"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    with pytest.raises(UserError, match=r"root of a hub cache.*snapshots/0123"):
        open_weights(cache)
    with pytest.raises(UserError, match="hf download"):
        open_weights("organization/name")
