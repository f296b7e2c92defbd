"""The table of devices, and entries that a user adds by a file."""

import pytest
from refusal import refused

from llamajax.backends import devices

_ENTRY = """
[[device]]
kind = "Ascend 910"
bfloat16 = 376e12
memory_gib = 64
hbm_bytes_per_s = 1.6e12
fast_bytes_per_s = 196e9
source = "the vendor's data sheet"
"""


@pytest.fixture
def table(tmp_path):
    """A function from TOML text to the file of it; the devices it adds are gone afterwards."""

    def write(text: str) -> str:
        (tmp_path / "devices.toml").write_text(text)
        return str(tmp_path / "devices.toml")

    yield write
    devices.use_device_table(None)


def test_an_added_device_has_a_peak_and_a_limit(table):
    assert devices.find("Ascend 910B3") is None
    devices.use_device_table(table(_ENTRY))
    found = devices.find("Ascend 910B3")
    assert found.limit_bytes == found.memory_bytes == 64 * 2**30
    assert devices.peak_flops("Ascend 910B3", "bfloat16") == (376e12, "the vendor's data sheet")
    assert devices.peak_flops("Ascend 910B3", "float32") is None
    devices.use_device_table(None)
    assert devices.find("Ascend 910B3") is None


def test_the_whole_peak_may_be_reached(table):
    devices.use_device_table(table(_ENTRY + "efficiency = 1"))
    assert devices.find("Ascend 910").product_rate("bfloat16") == 376e12


def test_an_added_device_comes_before_ours(table):
    devices.use_device_table(table(_ENTRY.replace("Ascend 910", "NVIDIA H100")))
    assert devices.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")[0] == 376e12


def test_every_mistake_is_named_at_once(table):
    text = _ENTRY.replace("bfloat16", "bfloat61").replace("64", '"64"').replace("1.6e12", "-1")
    text += _ENTRY + "efficiency = 66\n[devices]\nx = 1\n"
    with refused(
        "unknown key 'devices': devices stand under [[device]]",
        "device[0].bfloat61: unknown key; did you mean bfloat16?",
        "device[0].bfloat16: not set (float: peak FLOP/s of matrix products, dense)",
        "device[0].memory_gib: expected float, got '64' (str)",
        "device[0].hbm_bytes_per_s = -1.0: must be above 0",
        "device[1].efficiency = 66.0: is a share of the peak: at most 1",
        "kind 'Ascend 910' is there 2 times",
    ):
        devices.use_device_table(table(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = ", "is not TOML"),
        ("", "write [[device]] above each"),
        ('device = "x"', "write [[device]] above each"),
        (_ENTRY.replace("Ascend 910", ""), 'kind = "": is empty; an empty kind would be every'),
        (_ENTRY.replace("the vendor's data sheet", " "), "source =  : is empty; say where"),
        (None, "/nowhere.toml: cannot be read: No such file"),
    ],
)
def test_files_that_are_no_table(table, text, words):
    with refused(words):
        devices.use_device_table("/nowhere.toml" if text is None else table(text))


def test_every_entry_of_ours_names_its_source_and_says_whether_it_was_tested():
    names = [device.name for device in devices.DEVICES]
    for device in devices.DEVICES:
        assert device.source
        assert device.tested != device.source.endswith("; untested")
        assert devices.find(device.kind) is device, f"{device.kind} is hidden by an earlier entry"
    makers = {"mi300x", "max1550", "trn2", "n150", "h200", "v5p"}
    assert makers <= set(names)
