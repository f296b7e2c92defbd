"""Meta's consolidated files: the same logits as transformers, and no code of a pickle is run."""

import dataclasses
import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import stored
import torch_zip
from llama_cases import STORED, tokens, weights
from llamas import assert_close, load, logits
from meta_cases import HALF, meta_files, meta_params

from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError
from llamajax.formats.meta.torch_pickle import read_tensors
from llamajax.formats.weights import open_weights

EVEN = STORED["even"]
MESH = {"fsdp": 2, "tensor": 2}
ONES = np.ones(3, np.float32)


def store(
    directory: Path, c: ModelConfig, *, shards=1, split_rows=True, more=None, **params
) -> Path:
    """Weights as Meta stores them, in float32, in so many files."""
    directory.mkdir(exist_ok=True)
    arrays = weights(c) | (more or {})
    parts = meta_files(c, arrays, files=shards, split_rows=split_rows)
    for number, part in enumerate(parts):
        torch_zip.save(part, directory / f"consolidated.{number:02d}.pth")
    (directory / "params.json").write_text(json.dumps(meta_params(c) | params))
    return directory


def assert_refused(path: Path, message: str, opened=open_weights) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("shards", "split_rows"), [(1, True), (2, True), (2, False)])
def test_logits_of_joined_files_equal_transformers(tmp_path, shards, split_rows):
    path = store(tmp_path, EVEN, shards=shards, split_rows=split_rows)
    assert open_weights(path).model == EVEN
    assert open_weights(path).kind == "meta"
    ours = logits(load(path, **MESH), tokens(EVEN))
    assert_close(ours, stored.arrays("stored")["even"])


def test_files_of_torch_give_the_logits_of_transformers(capsys):
    """Two files of torch.save as they are: params.json of Llama 3.1, an OrderedDict of tensors."""
    config, path = STORED["small"], stored.FOLDER / "small_meta"
    assert open_weights(path).model == config
    assert "8 is taken, that of Llama 3.1" in capsys.readouterr().err
    assert_close(logits(load(path), tokens(config)), stored.arrays("stored")["small"])


@pytest.mark.live
def test_torch_reads_what_stands_for_its_files(tmp_path, live):
    """The files that the other tests read are as good as those of torch.save."""
    arrays = weights(STORED["small"]) | {"half": HALF.astype(np.float16)}
    found = live.torch.load(torch_zip.save(arrays, tmp_path / "x.pth"), weights_only=True)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(found[name].numpy(), array, err_msg=name)


def test_slices_are_those_of_the_whole(tmp_path):
    whole = open_weights(store(tmp_path / "1", EVEN)).source
    for split_rows in (True, False):
        path = store(tmp_path / "2", EVEN, shards=2, split_rows=split_rows)
        source = open_weights(path).source
        assert sorted(source.names()) == sorted(whole.names())
        for name in whole.names():
            expected = whole.read(name)
            assert np.array_equal(source.read(name), expected), name
            cut = tuple(slice(n // 3, n - 2) for n in expected.shape)
            assert np.array_equal(source.read(name, cut), expected[cut]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_of_half_precision(dtype):
    weight = HALF.astype(getattr(ml_dtypes, dtype, dtype))
    found = read_tensors(stored.FOLDER / f"{dtype}.pth")
    assert found.keys() == {"a", "b", "empty"}
    for name, expected in (("a", weight), ("b", weight[1:4, ::2]), ("empty", weight[:0])):
        assert found[name].shape == expected.shape
        assert found[name].dtype == expected.dtype
        assert found[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("stored_head", [False, True])
def test_a_tied_head_is_one_stored_twice_or_not_at_all(tmp_path, capsys, stored_head):
    config = STORED["llama32"]
    head = {"lm_head.weight": weights(config)["model.embed_tokens.weight"]} if stored_head else {}
    path = store(tmp_path, config, more=head, use_scaled_rope=True, max_seq_len=None)
    assert ("output.weight" in read_tensors(path / "consolidated.00.pth")) == stored_head
    assert open_weights(path).model == config
    assert "32 is taken, that of Llama 3.2" in capsys.readouterr().err
    assert_close(logits(load(path), tokens(config)), stored.arrays("stored")["llama32"])


def test_rope_scaling_by_rule_or_as_stated(tmp_path, capsys):
    config = STORED["llama31"]
    path = store(tmp_path, config, use_scaled_rope=True)
    assert open_weights(path).model == config
    assert "8 is taken, that of Llama 3.1" in capsys.readouterr().err
    assert_close(logits(load(path), tokens(config)), stored.arrays("stored")["llama31"])
    store(path, config, use_scaled_rope=True, rope_scaling_factor=16)
    capsys.readouterr()
    assert open_weights(path).model.rope_scaling.factor == 16.0
    assert capsys.readouterr().err == ""


def test_what_llama2_does_not_state(tmp_path):
    config = dataclasses.replace(EVEN, num_kv_heads=EVEN.num_heads)
    path = store(tmp_path / "llama-2-7b", config, max_seq_len=None)
    params = json.loads((path / "params.json").read_text())
    for key in ("rope_theta", "n_kv_heads", "vocab_size"):
        params.pop(key)
    (path / "params.json").write_text(json.dumps(params))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    opened = open_weights(path)
    assert (opened.model.rope_theta, opened.model.max_seq_len) == (10_000.0, 4096)
    assert (opened.model.num_kv_heads, opened.model.vocab_size) == (4, 98)
    assert opened.tokenizer == tmp_path / "tokenizer.model"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_cannot_run_anything(tmp_path):
    path, marker = store(tmp_path, EVEN), tmp_path / "ran"
    torch_zip.save({"w": ONES, "evil": Evil(marker)}, path / "consolidated.00.pth")
    assert_refused(path, r"asks for posix\.system, which is not allowed")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # what would have happened
    assert marker.exists()


def fake(*where, values=4, kind="FloatStorage") -> bytes:
    """The pickle of one tensor at an offset, of a size, with strides."""
    return torch_zip.pickled({"w": torch_zip.Tensor("0", *where, values=values, kind=kind)})


def test_a_fake_of_a_file_is_read_as_torch_would(tmp_path):
    content = np.arange(4, dtype=np.float32).tobytes()
    file = torch_zip.write_zip(tmp_path / "x.pth", fake(0, (2, 2), (1, 2)), {"data/0": content})
    assert np.array_equal(read_tensors(file)["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("described", "options", "message"),
    [
        (fake(0, (5,), (1,), values=5), {}, "holds 4 values of the 5"),
        (fake(0, (3, 2), (2, 1), values=4), {}, "holds 4 values of the 6"),
        (fake(-1, (2,), (1,)), {}, "is not plain"),
        (fake(0, (2,), (-1,)), {}, "is not plain"),
        (fake(0, (2, 2), (1,)), {}, "is not plain"),
        (fake(0, (4,), (1,), kind="LongStorage"), {}, r"torch\.LongStorage, which is not"),
        (fake(0, (4,), (1,)), {"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        (pickle.dumps([1, 2]), {}, "holds a list, not a dict"),
        (pickle.dumps({"w": 1}), {}, "'w' is not a tensor"),
        (pickle.dumps({"w": np.float32(1)}), {}, r"asks for numpy.*which is not allowed"),
        (b"\x80\x02}", {}, "truncated or damaged"),
        (b"", {}, "truncated or damaged"),
    ],
)
def test_files_that_are_not_plain_are_refused(tmp_path, described, options, message):
    file = torch_zip.write_zip(tmp_path / "x.pth", described, {"data/0": bytes(16)}, **options)
    assert_refused(file, message, read_tensors)


def test_old_truncated_and_empty_files(tmp_path):
    assert_refused(stored.FOLDER / "before_1_6.pth", "not a zip file as", read_tensors)
    (tmp_path / "lfs.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(tmp_path / "lfs.pth", "is a pointer of git-lfs", read_tensors)
    file = torch_zip.save({"w": np.ones(300, np.float32)}, tmp_path / "x.pth")
    for content in (file.read_bytes()[:-200], b""):
        file.write_bytes(content)
        assert_refused(file, "truncated or damaged", read_tensors)


def test_wrong_directories_are_refused_with_one_message(tmp_path):
    path = store(tmp_path / "a", EVEN, shards=2, vocab_size=98)
    (path / "consolidated.01.pth").rename(path / "consolidated.02.pth")
    assert_refused(path, r"consolidated\.01\.pth is missing")
    (path / "consolidated.02.pth").unlink()
    assert_refused(path, "a consolidated file is missing")
    store(path, EVEN, shards=2, n_heads=3, norm_eps=None)
    assert_refused(path, "norm_eps = None")
    store(path, EVEN, shards=2, n_heads=5)
    assert_refused(path, r"wq\.weight: 64 rows are no 5 heads")
    (path / "params.json").write_text("{")
    assert_refused(path, "not readable as JSON")


def test_tensors_of_other_models_are_named(tmp_path):
    path = store(tmp_path, EVEN, shards=2)
    file = path / "consolidated.01.pth"
    second = {n: np.array(a) for n, a in read_tensors(file).items() if n != "output.weight"}
    second |= {"layers.0.attention.wq.bias": ONES, "norm.weight": ONES}
    torch_zip.save(second, file)
    assert_refused(
        path,
        "norm.weight: the files hold parts of different shapes(.|\n)*"
        "output.weight: in 1 of 2 files(.|\n)*wq.bias: no part of",
    )
