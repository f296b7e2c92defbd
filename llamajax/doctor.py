"""`python -m llamajax.doctor`: what a backend can do, and what llamajax will do about the rest."""

import json
import time
from pathlib import Path
from typing import Any

from llamajax.config import Flag, parse_command_line
from llamajax.config.flags import BACKEND_FLAGS, NUM_CPU_DEVICES, backend_config
from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.verbs import run_verb

SUMMARY = (
    "Try everything that training needs on a backend, each probe by itself, and tell what works, "
    "what does not, and what llamajax does about it."
)
EXAMPLE = """python -m llamajax.doctor
python -m llamajax.doctor --backend=npu --plugin=/opt/npu/libpjrt_npu.so --json=doctor.json"""

_FLAGS = (
    Flag(
        name="json",
        metavar="OUT",
        annotation=str | None,
        default=None,
        doc="also write platform, verdict, repairs and every probe as a JSON object",
    ),
    Flag(
        name="html",
        metavar="OUT",
        annotation=str | None,
        default=None,
        doc="also write a page that shows them, for the vendor",
    ),
    Flag(
        name="timeout_s",
        metavar="S",
        annotation=float,
        default=120.0,
        doc="seconds that one probe may take, compilation included, before it counts as hanging",
    ),
    Flag(
        name="only",
        metavar="PROBE,...",
        annotation=str | None,
        default=None,
        doc="try these probes alone, by their names in the table; such a verdict is not kept",
    ),
    NUM_CPU_DEVICES,
    *BACKEND_FLAGS,
)


def main(argv: list[str]) -> int:
    """Exit code 0: ready, or ready with repairs; 1: not ready."""
    flags = parse_command_line(
        argv, verb="doctor", flags=_FLAGS, takes_config=False, summary=SUMMARY, example=EXAMPLE
    )
    if flags.timeout_s <= 0:
        raise UserError(f"--timeout_s={flags.timeout_s}: must be more than 0")
    for name in ("json", "html"):
        out = getattr(flags, name)
        if out and not Path(out).absolute().parent.is_dir():
            raise UserError(f"--{name}={out}: there is no directory to write it in")
    backend = backend_config(flags)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.backends.repairs import NOT_READY
    from llamajax.conformance import doctor_output as output
    from llamajax.conformance.probe_runner import ProbeRunner
    from llamajax.conformance.probe_table import chosen, verdict_on

    live = output.LiveResults()
    begun = time.monotonic()
    runner = ProbeRunner(backend=backend, limit_s=flags.timeout_s, show=live.show, begin=live.begin)
    runner.run(chosen(flags.only))
    total_s = time.monotonic() - begun
    machine = runner.machine
    num_devices = None if machine is None else machine["num_devices"]
    verdict = verdict_on(machine, runner.results, asked_for=backend.name)
    partial = flags.only is not None
    for line in output.text_lines(
        verdict, num_devices=num_devices, total_s=total_s, partial=partial
    ):
        print(line)
    if machine is not None and not partial:
        _keep(verdict)
    if flags.json:
        _write("json", flags.json, json.dumps(verdict.to_json(), indent=1))
    if flags.html:
        _write("html", flags.html, output.to_html(verdict, machine=machine, total_s=total_s))
    return int(verdict.verdict == NOT_READY)


def _keep(verdict: Any) -> None:
    """Keep the verdict where runs look for it, or say that it is not."""
    from llamajax.backends import write_verdict

    try:
        print(f"kept for train and the other verbs: {write_verdict(verdict)}")
    except OSError as error:
        say(f"warning: runs will not know of this verdict: {error}")


def _write(flag: str, out: str, text: str) -> None:
    """Write a file that was asked for, whole or not at all; UserError where that is refused."""
    write_file(Path(out), text + "\n", label=f"--{flag}={out}")


if __name__ == "__main__":
    run_verb(main)
