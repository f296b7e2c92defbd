"""Python's garbage collector, which a start turns off, is on again while a run trains."""

import gc

import pytest


@pytest.fixture
def off():
    gc.disable()
    yield
    gc.enable()


def test_the_collector_is_on_again_after_the_first_step(short_run, tmp_path, off):
    assert short_run(tmp_path, stop_after=1) == 143
    assert gc.isenabled()
