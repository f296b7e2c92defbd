"""Write the report of a run: one self-contained HTML page, also while the run goes on.

example:
  python -m llamajax.report --workdir=runs/quickstart
"""

import argparse
from pathlib import Path

from llamajax.monitoring.report.run_report import write_report
from llamajax.verbs import run_verb


def main(arguments: list[str]) -> int:
    """Parse the command line, rewrite `report.html` and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m llamajax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="the --workdir of a run"
    )
    print(write_report(parser.parse_args(arguments).workdir))
    return 0


if __name__ == "__main__":
    run_verb(main)
