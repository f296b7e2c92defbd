"""Repeat one step of a run twice from the checkpoint before it, and say what was wrong with it.

It tells whether the step repeats and is as recorded, the first tensor that is not finite, and the
documents with the largest loss.

Example:
  python -m llamajax.replay --workdir=runs/mine --step=1234
"""

import dataclasses
import json
from pathlib import Path

from llamajax.config import MachineFlags, key, parse_command_line
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayFlags(MachineFlags):
    """Flags of `replay`."""

    workdir: str = key(
        "the --workdir of the run; nothing is written there", metavar="DIR", is_path=True
    )
    step: int = key("the step, as the log has it", metavar="N")
    blackbox: str | None = key(
        "a file of blackbox/: the step as it was then, before a rollback; none: as it is now",
        metavar="FILE",
        default=None,
        is_path=True,
    )
    json: bool = key("print what was found as one JSON object on one line", default=False)


def main(argv: list[str]) -> int:
    """Print what was found; return 0, whatever it is."""
    flags = parse_command_line(argv, ReplayFlags, verb="replay", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.replaying.replay_step import ReplayOptions, replay

    evidence = replay(
        ReplayOptions(
            workdir=Path(flags.workdir),
            step=flags.step,
            box=None if flags.blackbox is None else Path(flags.blackbox),
            mesh=flags.mesh,
            backend=flags.backend_config,
        )
    )
    if flags.json:
        print(json.dumps(evidence.to_json(), allow_nan=False))
    else:
        print("\n".join(evidence.lines()))
    return 0


if __name__ == "__main__":
    run_verb(main)
