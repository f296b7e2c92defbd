"""Our safetensors reader and writer beside the library's; every way a file can be damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llamajax.errors import UserError
from llamajax.formats.huggingface.safetensors_files import (
    read_part,
    read_places,
    write_safetensors,
)

DRAW = np.random.default_rng(0)
ARRAYS = {
    name: DRAW.normal(size=shape).astype(dtype)
    for name, shape, dtype in (
        ("a", (7, 5), np.float32),
        ("b", (3, 4, 2), ml_dtypes.bfloat16),
        ("c", (6,), np.float16),
        ("d", (0, 3), np.float32),
    )
}


def bits(array):
    return array.dtype, array.shape, array.tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    return path


def test_the_librarys_files_and_their_parts_are_read(file):
    places = read_places(file)
    assert places.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert bits(read_part(places[name], None)) == bits(array)
    for index in ((slice(2, 5), slice(0, 5)), (slice(1, 7), slice(2, 4))):
        np.testing.assert_array_equal(read_part(places["a"], index), ARRAYS["a"][index])


def test_the_library_reads_our_files(tmp_path):
    path = tmp_path / "y.safetensors"
    arrays = {"p": ARRAYS["b"], "q": ARRAYS["b"][:, ::2], "r": ARRAYS["b"][0]}
    shapes = {name: array.shape for name, array in arrays.items()}
    write_safetensors(path, shapes, np.dtype(ml_dtypes.bfloat16), iter(arrays.values()))
    loaded = safetensors.numpy.load_file(path)
    assert {n: bits(a) for n, a in loaded.items()} == {n: bits(a) for n, a in arrays.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["a"].update(shape=[7, 6]), "for shape"),
        (lambda h: h["a"].update(dtype="X9"), "unknown dtype X9"),
        (lambda h: h["a"].update(h["b"]), "overlap"),
        (lambda h: h["a"].pop("shape"), "not that of safetensors"),
        (lambda h: h["a"].update(data_offsets=[10_000, 10_140]), "cut off"),
    ],
)
def test_a_wrong_header_is_refused(file, change, words):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match=words):
        read_places(file)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_cut_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="cut off"):
        read_places(file)


def test_a_pointer_and_a_file_that_shrinks_later_are_refused(file):
    place = read_places(file)["a"]
    file.write_bytes(file.read_bytes()[: place.offset + 8])
    with pytest.raises(UserError, match="ended while"):
        read_part(place, None)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="run `git lfs pull`"):
        read_places(file)
