"""Write the report of a run: one self-contained HTML page, also while the run goes on.

Several runs, separated by commas, are compared on one page.

Example:
  python -m llamajax.report --workdir=runs/quickstart
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llamajax.config import Flags, key, parse_command_line
from llamajax.config.forms import check_output
from llamajax.errors import say
from llamajax.monitoring.report.run_report import check_workdirs, write_report
from llamajax.monitoring.report.server import ReportServer
from llamajax.verbs import run_verb

_PORT = 8365


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFlags(Flags):
    """Flags of `report`."""

    workdir: tuple[str, ...] = key(
        "the --workdir of a run; of several runs to compare them, separated by commas",
        metavar="DIR[,DIR...]",
        is_path=True,
    )
    output: str | None = key(
        "where to write the page; default report.html in the workdir, or comparison.html in the "
        "first of several",
        default=None,
        metavar="FILE",
        is_path=True,
        check=check_output,
    )
    price_per_hour: float | None = key(
        "price of one device for an hour, in any currency: times are shown in money as well. It is "
        "kept in run.json for later reports",
        default=None,
        metavar="X",
        above=0,
    )
    serve: int | None = key(
        f"write nothing; serve the page at this port of localhost ({_PORT} if none is given), "
        "where it follows the run, until Ctrl-C",
        default=None,
        metavar="PORT",
        at_least=0,
        below=65536,
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the values together."""
        if not self.workdir:
            yield "--workdir: names no directory"
        if self.output is not None and self.serve is not None:
            yield "--serve writes no page; leave out --output, or write it without --serve"


def main(argv: list[str]) -> int:
    """Write the page and print its path, or serve it; return 0."""
    argv = [f"--serve={_PORT}" if _is_bare(argv, i) else token for i, token in enumerate(argv)]
    flags = parse_command_line(argv, ReportFlags, verb="report", doc=__doc__)
    one = Path(",".join(flags.workdir))  # whose name has a comma
    workdirs = [one] if one.is_dir() else [Path(text) for text in flags.workdir]
    if flags.serve is None:
        output = Path(flags.output) if flags.output else None
        print(write_report(*workdirs, output=output, price_per_hour=flags.price_per_hour))
        return 0
    check_workdirs(workdirs)
    server = ReportServer(workdirs, port=flags.serve, price_per_hour=flags.price_per_hour)
    with server:
        say(f"serving {server.address}  (Ctrl-C ends)")
        server.serve_forever()
    return 0


def _is_bare(argv: list[str], i: int) -> bool:
    """Return whether this is `--serve` without a port behind it."""
    return argv[i] == "--serve" and (i + 1 == len(argv) or not argv[i + 1].isdecimal())


if __name__ == "__main__":
    run_verb(main)
