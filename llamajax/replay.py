"""Repeat one step of a run, twice, from the checkpoint before it, and say what was wrong.

It tells whether the step repeats and is as recorded, the first tensor that is not finite, and the
documents with the largest loss.

Example:
  python -m llamajax.replay --workdir=runs/mine --step=1234
"""

import json

from llamajax.config import parse_command_line
from llamajax.replaying.replay_options import ReplayOptions
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Print what was found; return 0, whatever it is."""
    options = parse_command_line(argv, ReplayOptions, verb="replay", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.replaying.replay_step import replay

    evidence = replay(options)
    if options.json:
        print(json.dumps(evidence.to_json(), allow_nan=False))
    else:
        print("\n".join(evidence.lines()))
    return 0


if __name__ == "__main__":
    run_verb(main)
