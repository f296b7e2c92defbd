"""`python -m llamajax.replay`: do one step of a run again and say what was wrong with it."""

import json
from pathlib import Path

from llamajax.config import parse_command_line
from llamajax.config.flags import MACHINE_FLAGS, Flag, backend_config
from llamajax.verbs import run_verb

SUMMARY = (
    "Do one step of a run again, twice, from the checkpoint before it: whether it repeats and is "
    "as recorded, the first tensor that is not finite, the documents with the largest loss."
)
EXAMPLE = "python -m llamajax.replay --workdir=runs/mine --step=1234"
FLAGS = (
    Flag(name="workdir", metavar="DIR", doc="the --workdir of the run; nothing is written there"),
    Flag(name="step", metavar="N", annotation=int, doc="the step, as the log has it"),
    Flag(
        name="blackbox",
        metavar="FILE",
        annotation=str | None,
        default=None,
        doc="a file of blackbox/: the step as it was then, before a rollback; none: as it is now",
    ),
    Flag(
        name="json",
        annotation=bool,
        default=False,
        doc="print what was found as one JSON object on one line",
    ),
)


def main(argv: list[str]) -> int:
    """Exit code 0, whatever the verdict."""
    found = parse_command_line(
        argv,
        verb="replay",
        takes_config=False,
        flags=(*FLAGS, *MACHINE_FLAGS),
        summary=SUMMARY,
        example=EXAMPLE,
    )
    backend = backend_config(found)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.replaying.replay_step import ReplayOptions, replay

    evidence = replay(
        ReplayOptions(
            workdir=Path(found.workdir),
            step=found.step,
            box=None if found.blackbox is None else Path(found.blackbox),
            mesh=found.mesh,
            backend=backend,
        )
    )
    if found.json:
        print(json.dumps(evidence.to_json(), allow_nan=False))
    else:
        print("\n".join(evidence.lines()))
    return 0


if __name__ == "__main__":
    run_verb(main)
