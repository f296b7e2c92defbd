"""`python -m llamajax.doctor`: what a backend can do, and what llamajax will do about the rest."""

import dataclasses
import json
import time
from pathlib import Path

from llamajax.config import Flag, parse_command_line
from llamajax.config.flags import BACKEND_FLAGS, NUM_CPU_DEVICES, backend_config
from llamajax.errors import UserError, run_verb

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
    from llamajax.conformance import output
    from llamajax.conformance.examination import Examination
    from llamajax.conformance.table import PROBES
    from llamajax.conformance.verdict import NOT_READY, judge

    live = output.Live()
    begun = time.monotonic()
    examination = Examination(
        backend=backend_config(flags), limit_s=flags.timeout_s, show=live.show, begin=live.begin
    )
    examination.run(PROBES)
    verdict = judge(examination.outcomes)
    total_s = time.monotonic() - begun
    machine, outcomes = examination.machine, examination.outcomes
    print(output.to_text(machine, outcomes, verdict, total_s=total_s))
    if flags.json:
        found = {
            "platform": machine and machine["platform"],
            "device_kind": machine and machine["device_kind"],
            "verdict": verdict.word,
            "repairs": list(verdict.repairs),
            "probes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        _write(Path(flags.json), json.dumps(found, indent=1))
    return int(verdict.word == NOT_READY)


def _write(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_text(text + "\n", encoding="utf-8")
    hidden.replace(path)


if __name__ == "__main__":
    run_verb(main)
