"""What a start leaves out: garbage collection, on again while a run trains, and Orbax."""

import gc
import subprocess
import sys

import pytest


@pytest.fixture
def off():
    gc.disable()
    yield
    gc.enable()


def test_the_collector_is_on_again_after_the_first_step(short_run, tmp_path, off):
    assert short_run(tmp_path, stop_after=1) == 143
    assert gc.isenabled()


def test_a_start_does_not_import_orbax_which_can_be_imported_afterwards():
    code = (
        "import sys, llamajax.training.run\n"
        "assert 'orbax.checkpoint' not in sys.modules\n"
        "import orbax.checkpoint, llamajax.checkpoint.orbax_writer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
