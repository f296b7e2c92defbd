"""Probes that end in every way a probe can end, for `test_probe_runner.py`."""

import os
import threading
from pathlib import Path

from llamajax.conformance.bench import Bench, UnsupportedError, WrongError


def passes(bench: Bench) -> str:
    bench.folder.joinpath("file").write_text("its folder is there")
    return f"on {len(bench.devices)}"


def is_wrong(_: Bench) -> str:
    raise WrongError("3 instead of 2")


def is_unsupported(_: Bench) -> str:
    raise UnsupportedError("there is no such unit")


def raises(_: Bench) -> str:
    raise KeyError("what nobody thought of")


def aborts(_: Bench) -> str:
    os.abort()


def leaves(_: Bench) -> str:
    os._exit(3)


def hangs(_: Bench) -> str:
    Path(os.environ["HANGS"]).touch()
    threading.Event().wait()
    return "never"


def shows_repairs(bench: Bench) -> str:
    return ",".join(bench.machine.repairs)
