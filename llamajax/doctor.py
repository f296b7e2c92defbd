"""Try everything that training needs on a backend, each probe by itself.

It tells what works, what does not, and what llamajax does about it.

Example:
  python -m llamajax.doctor
  python -m llamajax.doctor --backend=npu --plugin=/opt/npu/libpjrt_npu.so --json=doctor.json
"""

import dataclasses
import json
import time
from pathlib import Path

from llamajax.config import BackendFlags, key, parse_command_line
from llamajax.config.forms import check_output
from llamajax.errors import say
from llamajax.files import write_file
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorFlags(BackendFlags):
    """Flags of `doctor`."""

    json: str | None = key(
        "also write platform, verdict, repairs, attention, options and every probe as JSON",
        metavar="OUT",
        default=None,
        is_path=True,
        check=check_output,
    )
    html: str | None = key(
        "also write a page that shows them, for the vendor",
        metavar="OUT",
        default=None,
        is_path=True,
        check=check_output,
    )
    timeout_s: float = key(
        "seconds that one probe may take, compilation included, before it counts as hanging",
        metavar="S",
        default=120.0,
        above=0,
    )
    only: str | None = key(
        "try these probes alone, by their names in the table; such a verdict is not kept",
        metavar="PROBE,...",
        default=None,
    )


def main(argv: list[str]) -> int:
    """Return 0 if ready, or ready with repairs; 1 if not ready."""
    flags = parse_command_line(argv, DoctorFlags, verb="doctor", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.backends import write_verdict
    from llamajax.backends.repairs import NOT_READY
    from llamajax.conformance import doctor_output
    from llamajax.conformance.probe_runner import ProbeRunner
    from llamajax.conformance.probe_table import chosen, verdict_on

    begun = time.monotonic()
    backend, live = flags.backend_config, doctor_output.LiveResults()
    runner = ProbeRunner(backend=backend, limit_s=flags.timeout_s, live=live)
    runner.run(chosen(flags.only))
    total_s, machine = time.monotonic() - begun, runner.machine
    verdict = verdict_on(machine, runner.results, asked_for=backend.name)
    partial = flags.only is not None
    attention = []
    if machine is not None:
        attention = doctor_output.attention_rows(machine, verdict.repairs)
    lines = [
        *doctor_output.text_lines(verdict, machine=machine, total_s=total_s, partial=partial),
        *doctor_output.attention_lines(attention),
    ]
    print("\n".join(lines))
    if machine is not None and not partial:
        try:
            print(f"kept for train and the other verbs: {write_verdict(verdict)}")
        except OSError as error:
            say(f"warning: runs will not know of this verdict: {error}")
    if flags.json:
        facts = {"compiler_options": None, **runner.found, "attention": attention}
        text = json.dumps(dataclasses.asdict(verdict) | facts, indent=1) + "\n"
        write_file(Path(flags.json), text, label=f"--json={flags.json}")
    if flags.html:
        text = doctor_output.to_html(verdict, lines, machine=machine)
        write_file(Path(flags.html), text, label=f"--html={flags.html}")
    return int(verdict.verdict == NOT_READY)


if __name__ == "__main__":
    run_verb(main)
