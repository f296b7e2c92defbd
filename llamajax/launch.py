"""`python -m llamajax.launch`: start a command as several workers, watch them, start them again."""

from llamajax.config import parse_command_line
from llamajax.launching.launch_options import FLAGS, build_options, split_command
from llamajax.launching.launcher import launch
from llamajax.verbs import run_verb

SUMMARY = (
    "Run COMMAND (after --) as several workers on this node and on others; when one fails, end all "
    "and start them again from the newest checkpoint. One log a worker and attempt."
)
EXAMPLE = (
    "python -m llamajax.launch --processes_per_node=1 --nodes=8 --node_rank=0 "
    "--coordinator=node0:8476 -- python -m llamajax.train --config=configs/llama3_70b.py "
    "--workdir=/shared/llama3_70b"
)


def main(argv: list[str]) -> int:
    """Exit code: 0 finished, 143 stopped by a signal, else that of the worker that failed."""
    own, command = split_command(argv)
    flags = parse_command_line(
        own, verb="launch", flags=FLAGS, takes_config=False, summary=SUMMARY, example=EXAMPLE
    )
    return launch(build_options(flags, command))


if __name__ == "__main__":
    run_verb(main)
