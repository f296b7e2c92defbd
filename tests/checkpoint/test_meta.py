"""Meta's consolidated files: the same logits as transformers, and no code of a pickle is run."""

import dataclasses
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch_llamas import (  # noqa: E402  (needs torch)
    GROUPED,
    SCALED,
    TIED,
    assert_close,
    interleaved,
    load,
    our_logits,
    tokens,
    torch_llama,
    torch_logits,
)

from llamajax.checkpoint.meta_pickle import read_tensors  # noqa: E402
from llamajax.checkpoint.weights import open_weights  # noqa: E402
from llamajax.config.schema import MeshConfig, ModelConfig  # noqa: E402
from llamajax.errors import UserError  # noqa: E402

LAYER = {
    "input_layernorm": ("attention_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}


def as_meta(model, c: ModelConfig, *, split_rows: bool) -> dict:
    """Their name -> (whole tensor, dimension it is split along, None for none)."""
    found = {"rope.freqs": (torch.ones(c.head_size // 2), None)}
    for name, weight in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            found["tok_embeddings.weight"] = (weight, 0 if split_rows else 1)
        elif name == "lm_head.weight":
            found["output.weight"] = (weight, 0)
        elif name == "model.norm.weight":
            found["norm.weight"] = (weight, None)
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            theirs, dim = LAYER[part]
            heads = {"attention.wq": c.num_heads, "attention.wk": c.num_kv_heads}.get(theirs)
            weight = interleaved(weight, heads) if heads else weight
            found[f"layers.{layer}.{theirs}.weight"] = (weight, dim)
    return found


def store(directory: Path, model, c: ModelConfig, *, shards=1, split_rows=True, **params) -> Path:
    """`model` as Meta stores it, in float32, in so many files."""
    directory.mkdir(exist_ok=True)
    whole = as_meta(model, c, split_rows=split_rows)
    for number in range(shards):
        part = OrderedDict(
            (name, (w if dim is None else w.chunk(shards, dim)[number]).clone())
            for name, (w, dim) in whole.items()
        )
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    facts = {
        "dim": c.hidden_size,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "n_kv_heads": c.num_kv_heads,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "vocab_size": -1,
        "multiple_of": 256,
        "max_seq_len": c.max_seq_len,
    }
    (directory / "params.json").write_text(json.dumps(facts | params))
    return directory


@pytest.fixture(scope="module")
def grouped():
    return torch_llama(dataclasses.replace(GROUPED, vocab_size=98))


EVEN = dataclasses.replace(GROUPED, vocab_size=98)


@pytest.mark.parametrize(("shards", "split_rows"), [(1, True), (2, True), (2, False)])
def test_logits_of_joined_files_equal_transformers(tmp_path, grouped, shards, split_rows):
    path = store(tmp_path, grouped, EVEN, shards=shards, split_rows=split_rows)
    assert open_weights(path).model == EVEN
    assert open_weights(path).kind == "meta"
    ids = tokens(EVEN)
    model = load(path, MeshConfig(fsdp=2, tensor=2))
    assert_close(our_logits(model, ids), torch_logits(grouped, ids))


def test_slices_are_those_of_the_whole(tmp_path, grouped):
    whole = open_weights(store(tmp_path / "1", grouped, EVEN)).source
    for split_rows in (True, False):
        path = store(tmp_path / "2", grouped, EVEN, shards=2, split_rows=split_rows)
        source = open_weights(path).source
        assert sorted(source.names()) == sorted(whole.names())
        for name in whole.names():
            expected = whole.read(name)
            assert np.array_equal(source.read(name), expected), name
            cut = tuple(slice(n // 3, n - 2) for n in expected.shape)
            assert np.array_equal(source.read(name, cut), expected[cut]), name
        source.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_of_half_precision(tmp_path, dtype):
    weight = torch.randn(6, 10).to(dtype)
    torch.save({"a": weight, "b": weight[1:4, ::2], "empty": weight[:0]}, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")
    for name, expected in (("a", weight), ("b", weight[1:4, ::2]), ("empty", weight[:0])):
        assert found[name].shape == tuple(expected.shape)
        bits = expected.contiguous().view(torch.int16).numpy()
        assert np.array_equal(np.ascontiguousarray(found[name]).view(np.int16), bits), name


@pytest.mark.parametrize("stored_head", [False, True])
def test_a_tied_head_is_one_stored_twice_or_not_at_all(tmp_path, capsys, stored_head):
    config = dataclasses.replace(
        TIED,
        rope_theta=500_000.0,
        rope_scaling=dataclasses.replace(SCALED.rope_scaling, factor=32.0),
        max_seq_len=131_072,
    )
    reference, ids = torch_llama(config), tokens(config)
    path = store(tmp_path, reference, config, use_scaled_rope=True, max_seq_len=None)
    if not stored_head:
        tensors = torch.load(path / "consolidated.00.pth")
        del tensors["output.weight"]
        torch.save(tensors, path / "consolidated.00.pth")
    assert open_weights(path).model == config
    assert "32 is taken, that of Llama 3.2" in capsys.readouterr().err
    assert_close(our_logits(load(path, MeshConfig()), ids), torch_logits(reference, ids))


def test_rope_scaling_by_rule_or_as_stated(tmp_path, capsys):
    reference, ids = torch_llama(SCALED), tokens(SCALED)
    path = store(tmp_path, reference, SCALED, use_scaled_rope=True)
    assert open_weights(path).model == SCALED
    assert "8 is taken, that of Llama 3.1" in capsys.readouterr().err
    assert_close(our_logits(load(path, MeshConfig()), ids), torch_logits(reference, ids))
    store(path, reference, SCALED, use_scaled_rope=True, rope_scaling_factor=16)
    capsys.readouterr()
    assert open_weights(path).model.rope_scaling.factor == 16.0
    assert capsys.readouterr().err == ""


def test_what_llama2_does_not_state(tmp_path):
    config = dataclasses.replace(EVEN, num_kv_heads=EVEN.num_heads)
    path = store(tmp_path / "llama-2-7b", torch_llama(config), config, max_seq_len=None)
    params = json.loads((path / "params.json").read_text())
    for key in ("rope_theta", "n_kv_heads", "vocab_size"):
        params.pop(key)
    (path / "params.json").write_text(json.dumps(params))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    weights = open_weights(path)
    assert (weights.model.rope_theta, weights.model.max_seq_len) == (10_000.0, 4096)
    assert (weights.model.num_kv_heads, weights.model.vocab_size) == (4, 98)
    assert weights.tokenizer == tmp_path / "tokenizer.model"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_cannot_run_anything(tmp_path, grouped):
    path, marker = store(tmp_path, grouped, EVEN), tmp_path / "ran"
    torch.save({"w": torch.ones(2), "evil": Evil(marker)}, path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"asks for posix\.system, which is not allowed"):
        open_weights(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # what would have happened
    assert marker.exists()


def zipped(path: Path, described: bytes, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", described)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


class Fake(pickle.Pickler):
    """Pickles tuples ("storage", ...) as torch does its storages."""

    def persistent_id(self, thing):
        is_storage = isinstance(thing, tuple) and thing[:1] == ("storage",)
        return thing if is_storage else None


class Rebuilt:
    def __init__(self, *arguments) -> None:
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def fake(offset, size, stride, *, values=4, kind=torch.FloatStorage) -> bytes:
    stream = io.BytesIO()
    storage = ("storage", kind, "0", "cpu", values)
    tensor = Rebuilt(storage, offset, size, stride, False, OrderedDict())
    Fake(stream, protocol=2).dump({"w": tensor})
    return stream.getvalue()


def test_a_fake_of_a_file_is_read_as_torch_would(tmp_path):
    content = np.arange(4, dtype=np.float32).tobytes()
    file = zipped(tmp_path / "x.pth", fake(0, (2, 2), (1, 2)), {"data/0": content})
    assert np.array_equal(read_tensors(file)["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("described", "options", "message"),
    [
        (fake(0, (5,), (1,), values=5), {}, "holds 4 values of the 5"),
        (fake(0, (3, 2), (2, 1), values=4), {}, "holds 4 values of the 6"),
        (fake(-1, (2,), (1,)), {}, "is not plain"),
        (fake(0, (2,), (-1,)), {}, "is not plain"),
        (fake(0, (2, 2), (1,)), {}, "is not plain"),
        (fake(0, (4,), (1,), kind=torch.LongStorage), {}, r"torch\.LongStorage, which is not"),
        (fake(0, (4,), (1,)), {"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        (pickle.dumps([1, 2]), {}, "holds a list, not a dict"),
        (pickle.dumps({"w": 1}), {}, "'w' is not a tensor"),
        (pickle.dumps({"w": np.float32(1)}), {}, r"asks for numpy.*which is not allowed"),
        (b"\x80\x02}", {}, "truncated or damaged"),
        (b"", {}, "truncated or damaged"),
    ],
)
def test_files_that_are_not_plain_are_refused(tmp_path, described, options, message):
    file = zipped(tmp_path / "x.pth", described, {"data/0": bytes(16)}, **options)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(file)
    assert str(file) in str(caught.value)


def test_old_truncated_and_empty_files(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip file as"):
        read_tensors(file)
    torch.save({"w": torch.ones(300)}, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_tensors(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="truncated or damaged"):
        read_tensors(file)


def test_wrong_directories_are_refused_with_one_message(tmp_path, grouped):
    path = store(tmp_path / "a", grouped, EVEN, shards=2, vocab_size=98)
    (path / "consolidated.01.pth").rename(path / "consolidated.02.pth")
    with pytest.raises(UserError, match=r"consolidated\.01\.pth is missing"):
        open_weights(path)
    (path / "consolidated.02.pth").unlink()
    with pytest.raises(UserError, match="a consolidated file is missing"):
        open_weights(path)
    store(path, grouped, EVEN, shards=2, n_heads=3, norm_eps=None)
    with pytest.raises(UserError, match="norm_eps = None"):
        open_weights(path)
    store(path, grouped, EVEN, shards=2, n_heads=5)
    with pytest.raises(UserError, match=r"wq\.weight: 64 rows are no 5 heads"):
        open_weights(path)
    (path / "params.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        open_weights(path)


def test_tensors_of_other_models_are_named(tmp_path, grouped):
    path = store(tmp_path, grouped, EVEN, shards=2)
    second = torch.load(path / "consolidated.01.pth")
    second["layers.0.attention.wq.bias"] = torch.ones(3)
    second["norm.weight"] = torch.ones(3)
    del second["output.weight"]
    torch.save(second, path / "consolidated.01.pth")
    with pytest.raises(UserError) as caught:
        open_weights(path)
    for part in ("wq.bias: no part of", "norm.weight: the files hold parts of different shapes",
                 "output.weight: in 1 of 2 files"):  # fmt: skip
        assert part in str(caught.value)
