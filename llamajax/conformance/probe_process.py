"""The process in which probes run: `python -m llamajax.conformance.probe_process FD`.

It reads a request from standard input and writes one JSON object a line to file descriptor FD. A
probe that dies takes this process with it; the parent then knows which one it was.
"""

import dataclasses
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llamajax import backends
from llamajax.config.schema import BackendConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError
from llamajax.errors import UserError

_MESSAGE_CHARACTERS = 400


def main() -> int:
    """Run the requested probes in order; return 2 where the backend refuses to start."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks where a probe hangs
    backends.exit_with_launcher()
    request = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w", buffering=1, encoding="utf-8") as pipe:

        def report(**facts: Any) -> None:
            print(json.dumps(facts), file=pipe, flush=True)

        try:
            config = BackendConfig(**request["backend"])
            machine = backends.start(config, keep_programs=request["keep_programs"])
        except UserError as error:
            report(refused=str(error))
            return 2
        plugin = backends.built_for(config, jax.devices()[0].client)
        report(machine=dataclasses.asdict(machine), plugin=plugin)
        _run_all(request["probes"], machine, Path(request["folder"]), report)
    return 0


def _run_all(
    probes: list[dict[str, str]], machine: Any, folder: Path, report: Callable[..., None]
) -> None:
    for probe in probes:
        report(begins=probe["name"])
        own = folder / probe["name"]
        own.mkdir(parents=True)
        bench = Bench(devices=jax.devices(), machine=machine, folder=own)
        module, _, name = probe["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        begun = time.monotonic()
        status, message, healthy = _result(function, bench)
        time_s = round(time.monotonic() - begun, 3)
        report(ends=probe["name"], status=status, message=message, time_s=time_s)
        if not healthy:  # what failed may leave the runtime in disorder: the rest gets a new one
            return


def _result(function: Callable[[Bench], str], bench: Bench) -> tuple[str, str, bool]:
    """Return status, message, and whether this process may go on; other exceptions end it."""
    try:
        return "pass", function(bench), True
    except (UnsupportedError, NotImplementedError) as error:
        return "unsupported", _one_line(error), True
    except WrongError as error:
        return "fail", _one_line(error), True
    except jax.errors.JaxRuntimeError as error:
        unimplemented = "UNIMPLEMENTED" in str(error)
        return "unsupported" if unimplemented else "fail", _one_line(error), unimplemented


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[: _MESSAGE_CHARACTERS - 4] + " ..."


if __name__ == "__main__":
    sys.exit(main())
