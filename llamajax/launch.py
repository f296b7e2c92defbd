"""Run a command as several workers, on one node or many, and restart them when one fails.

When a worker fails, all are ended and started again from the newest checkpoint. Each worker and
attempt has one log. The command stands after `--`.

Example:
  python -m llamajax.launch --processes_per_node=1 --nodes=8 --node_rank=0 \\
      --coordinator=node0:8476 -- \\
      python -m llamajax.train --config=configs/llama3_70b.py --workdir=/shared/llama3_70b
"""

from llamajax.config import parse_command_line
from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.launcher import launch
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Return 0 if finished, 143 if stopped by a signal, else the code of the worker that failed."""
    return launch(parse_command_line(argv, LaunchOptions, verb="launch", doc=__doc__))


if __name__ == "__main__":
    run_verb(main)
