"""The small run of these tests, and its virtual devices as if they were in the device table."""

import dataclasses
from pathlib import Path

import pytest

from llamajax.backends import absent_devices
from llamajax.backends.devices import DEVICES
from llamajax.config import load


@pytest.fixture(scope="session")
def config():
    """The small run."""
    return load(str(Path(__file__).with_name("small_run.py")))


@pytest.fixture(scope="session")
def table():
    """The device table by name."""
    return {device.name: device for device in DEVICES}


@pytest.fixture(scope="session")
def known_devices(config, table):
    """Returns cpu:8 as if it were in the device table, with that much memory for a program."""

    def target(limit_bytes=2**33):
        entry = dataclasses.replace(
            table["h100"], kind="cpu", name="cpu", has_share=False, xla_bytes=limit_bytes,
            float32=50e12,
        )  # fmt: skip
        return dataclasses.replace(absent_devices("cpu:8", config.backend), entry=entry)

    return target
