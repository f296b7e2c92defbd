"""What is stored is what transformers and PyTorch compute today."""

import json

import numpy as np
import pytest
import safetensors.numpy
import stored

# Relative to the largest value of an array; a fifth of what the tests of ours allow.
TOLERANCE = 2e-6
AFTER_UPDATES = 2e-5


@pytest.fixture(scope="module")
def written(live, assets, tmp_path_factory):
    """A folder of references computed now."""
    folder = tmp_path_factory.mktemp("references")
    live.write(folder, assets)
    return folder


def names() -> list[str]:
    """Every stored file but the sources: write_references.py writes all of them."""
    files = [path for path in stored.FOLDER.rglob("*") if path.is_file()]
    return sorted(str(f.relative_to(stored.FOLDER)) for f in files if ".py" not in f.suffix)


@pytest.mark.live
def test_the_script_writes_these_files(written):
    assert names() == sorted(
        str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()
    )


@pytest.mark.live
@pytest.mark.parametrize("name", [name for name in names() if name.endswith(".npz")])
def test_arrays_are_those_of_today(written, name):
    expected = stored.arrays(name.removesuffix(".npz"))
    with np.load(written / name) as found:
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert (found[key].shape, found[key].dtype) == (array.shape, array.dtype), key
            error = np.abs(found[key] - array).max() / np.abs(array).max()
            assert error <= (AFTER_UPDATES if "updates" in key else TOLERANCE), key


@pytest.mark.live
@pytest.mark.parametrize("name", [name for name in names() if name.endswith(".json")])
def test_texts_are_those_of_today(written, name):
    found, expected = (json.loads((f / name).read_text("utf-8")) for f in (written, stored.FOLDER))
    for one in (found, expected):
        for key in ("versions", "transformers_version"):
            one.pop(key, None)
    assert found == expected


@pytest.mark.live
@pytest.mark.parametrize("name", [n for n in names() if n.endswith((".pth", ".safetensors"))])
def test_files_of_tensors_are_those_of_today(written, name, live):
    found, expected = (
        safetensors.numpy.load_file(folder / name)
        if name.endswith(".safetensors")
        else live.torch.load(folder / name, weights_only=True)
        for folder in (written, stored.FOLDER)
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert bool((found[key] == tensor).all()), key


def test_the_folder_is_small():
    assert sum((stored.FOLDER / name).stat().st_size for name in names()) < 2_000_000
