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
from llamas import BASE, edit_config, export_hf, random_model
from meshes import mesh_of
from tiny_state import assert_same_bits, checkpointer, flip

from llamajax import convert, generate
from llamajax.checkpoint.restore import open_checkpoint
from llamajax.errors import UserError
from llamajax.formats.llama_sources import CheckpointSource
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model

MESHES = [{}, {"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
MODEL = random_model(BASE)
META = {"config": {"model": dataclasses.asdict(BASE)}}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    export_hf(MODEL, BASE, path)
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
def copy(exported, tmp_path) -> Path:
    """The Hugging Face directory, free to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def read(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def write(directory: Path, arrays: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    safetensors.numpy.save_file(arrays, directory / name)


def write_index(directory: Path, index: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_refused(path: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_weights(path)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["huggingface", "llamajax"])
def test_weights_reach_any_mesh(kind, dtype, axes, exported, workdir):
    weights = open_weights(exported if kind == "huggingface" else workdir)
    assert (weights.kind, weights.model) == (kind, BASE)
    wanted = abstract_model(BASE, mesh_of(**axes), dtype=dtype)
    loaded = weights.load(wanted)
    assert_same_bits(
        loaded, jax.tree.map(lambda a, w: np.asarray(a).astype(w.dtype), MODEL, wanted)
    )
    leaves = [jax.tree.leaves(model) for model in (loaded, wanted)]
    assert [a.sharding for a in leaves[0]] == [a.sharding for a in leaves[1]]


def test_a_run_is_opened_at_its_newest_step_and_a_step_at_itself(workdir):
    assert open_weights(workdir).step == 7
    assert open_weights(workdir / "checkpoints").step == 7
    earlier = open_weights(workdir / "checkpoints" / "3")
    assert (earlier.step, earlier.tokenizer) == (3, workdir / "tokenizer.byte")


def test_a_damaged_checkpoint_is_refused(workdir, tmp_path):
    copy, wanted = tmp_path / "7", abstract_model(BASE, mesh_of())
    shutil.copytree(workdir / "checkpoints" / "7", copy)
    flip(copy)
    weights = open_weights(copy)
    with pytest.raises(UserError, match="checksum"):
        weights.load(wanted)
    with pytest.raises(UserError, match="checksum"):
        CheckpointSource(open_checkpoint(copy), BASE, wanted, None)


def test_values_that_are_not_finite_are_named(copy, tmp_path):
    broken = random_model(BASE)
    for module, name, value in ((broken.blocks.mlp, "up", np.nan), (broken, "norm", -np.inf)):
        weight = getattr(module, name)
        setattr(module, name, weight.replace(weight.get_value().at[0].set(value)))
    with checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(7, {"model": broken}, meta=META)
    arrays = read(copy)
    arrays[NORM][2] = np.nan
    write(copy, arrays)
    with pytest.raises(UserError, match=rf"{NORM} holds 1 values that are NaN"):
        open_weights(copy).load(abstract_model(BASE, mesh_of(fsdp=2)))
    message = r"checkpoints/7: these weights hold values .*: blocks/mlp/up, norm; take an earlier"
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path).load(abstract_model(BASE, mesh_of(fsdp=2)))
    main = [f"--checkpoint={tmp_path}", "--prompt_ids=1"]
    for verb, flags in ((generate, main), (convert, [f"--from={tmp_path}", f"--to={tmp_path}/hf"])):
        with pytest.raises(UserError, match="NaN or infinite"):
            verb.main(flags)
    assert not (tmp_path / "hf").exists()


def test_every_wrong_tensor_is_named_before_any_is_read(copy):
    arrays = read(copy)
    del arrays[NORM]
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(np.int8)
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    write(copy, arrays)
    with pytest.raises(UserError) as caught:
        open_weights(copy)
    _, embedding, *lines = str(caught.value).splitlines()
    assert "model.embed_tokens.weight" in embedding
    assert "int8" in embedding
    for part in ("norm.weight: missing", "[130, 24], the architecture [131, 24]", "bias: not part"):
        assert part in lines.pop(0)
    assert lines == []


def test_damaged_and_missing_files_are_named(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert_refused(copy, r"model\.safetensors is cut off")
    file.rename(copy / "pytorch_model.bin")
    assert_refused(copy, r"pytorch_model\.bin, pickled")
    (copy / "pytorch_model.bin").rename(copy / "training_args.bin")
    assert_refused(copy, r"there is neither model\.safetensors nor")
    (copy / "one.safetensors").write_bytes(content)
    write_index(copy, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    assert_refused(copy, r"two\.safetensors is missing")
    write_index(copy, {"weight_map": {"a": "one.safetensors"}})
    assert_refused(copy, r"a: .*does not hold it")
    write_index(copy, {})
    assert_refused(copy, "no weight_map")


def test_a_tied_head_may_be_there_but_not_differ(copy):
    edit_config(copy, tie_word_embeddings=True)
    wanted = abstract_model(dataclasses.replace(BASE, tie_embeddings=True), mesh_of())
    with pytest.raises(UserError, match=r"lm_head\.weight that differs"):
        open_weights(copy).load(wanted)
    arrays = read(copy)
    head = arrays["model.embed_tokens.weight"]
    for padding in (0, 3):
        padded = np.concatenate([head, np.zeros((padding, head.shape[1]), head.dtype)])
        write(copy, arrays | {"lm_head.weight": padded})
        loaded = open_weights(copy).load(wanted)
        assert loaded.head is None
        assert_same_bits(loaded.embedding, MODEL.embedding)


@pytest.mark.parametrize("content", ["{", '{"model_type": "gpt2"}', '{"train": {}}'])
def test_what_is_no_llama_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert_refused(tmp_path, "not readable as JSON|'gpt2' is not|holds no weights")
    assert_refused(tmp_path / "nowhere", "no such file")


def test_names_that_wrappers_of_torch_prefix_are_read(copy, exported):
    arrays = read(copy)
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "base_model.model."):
        write(copy, {prefix + n: a for n, a in arrays.items()})
        assert open_weights(copy).fingerprint() == open_weights(exported).fingerprint()
    write(copy, arrays | {f"module.{NORM}": arrays[NORM] + 1})
    assert_refused(copy, rf"module\.{NORM}.* {NORM}, which .*model\.safetensors holds too")


def test_the_index_decides_between_two_copies_of_a_tensor(copy, exported):
    arrays = read(copy)
    (copy / "model.safetensors").unlink()
    write(copy, {NORM: arrays[NORM]}, "1.safetensors")
    write(copy, arrays | {NORM: arrays[NORM] + 1}, "2.safetensors")
    files = dict.fromkeys(arrays, "2.safetensors") | {NORM: "1.safetensors"}
    write_index(copy, {"weight_map": files})
    assert open_weights(copy).fingerprint() == open_weights(exported).fingerprint()


def test_directories_without_weights_are_told_apart(tmp_path):
    cache, run = (tmp_path / name for name in ("models--a--b", "run"))
    (run / "checkpoints").mkdir(parents=True)
    assert_refused(run, "without a finished checkpoint")
    (cache / "snapshots" / "0123").mkdir(parents=True)
    assert_refused(cache, r"root of a hub cache.*snapshots/0123")
    assert_refused("organization/name", "hf download")
