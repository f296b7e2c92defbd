"""Write the report of a run: one self-contained HTML page, also while the run goes on.

Example:
  python -m llamajax.report --workdir=runs/quickstart
"""

import dataclasses
from pathlib import Path

from llamajax.config import Flags, key, parse_command_line
from llamajax.monitoring.report.run_report import write_report
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFlags(Flags):
    """Flags of `report`."""

    workdir: str = key("the --workdir of a run", metavar="DIR", is_path=True)


def main(argv: list[str]) -> int:
    """Rewrite `report.html` and print its path; return 0."""
    flags = parse_command_line(argv, ReportFlags, verb="report", doc=__doc__)
    print(write_report(Path(flags.workdir)))
    return 0


if __name__ == "__main__":
    run_verb(main)
