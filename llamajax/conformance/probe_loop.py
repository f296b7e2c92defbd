"""Run requested probes in this process, one after the other, and send what they give."""

import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import jax

from llamajax import backends
from llamajax.config.schema import BackendConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError
from llamajax.errors import UserError
from llamajax.processes.line_protocol import Connection, Message

_MESSAGE_CHARACTERS = 400


def run_probes(request: Message, parent: Connection) -> int:
    """Run the requested probes in order; return 2 where the backend refuses to start."""
    try:
        config = BackendConfig(**request["backend"])
        machine = backends.start(config, keep_programs=request["keep_programs"])
    except UserError as error:
        parent.send({"refused": str(error)})
        return 2
    plugin = backends.built_for(config, jax.devices()[0].client)
    parent.send({"machine": dataclasses.asdict(machine), "plugin": plugin})
    for probe in request["probes"]:
        name, folder = probe["name"], Path(request["folder"]) / probe["name"]
        parent.send({"begins": name})
        folder.mkdir(parents=True)
        module, _, function = probe["function"].partition(":")
        run = getattr(importlib.import_module(module), function)
        begun = time.monotonic()
        bench = Bench(devices=jax.devices(), machine=machine, folder=folder)
        status, message, healthy = _result(run, bench)
        result = {"name": name, "status": status, "message": message}
        parent.send({
            "result": result | {"time_s": time.monotonic() - begun}, "found": bench.found,
        })  # fmt: skip
        if not healthy:  # what failed may leave the runtime in disorder: the rest gets a new one
            break
    return 0


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
