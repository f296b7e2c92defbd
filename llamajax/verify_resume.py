"""Prove that a run of this config can be killed at any time.

It trains a few steps undisturbed, again with SIGKILL at random moments (also in a save), and
resumes on this mesh and on another: the losses must agree, bit by bit on the same mesh.

Example:
  python -m llamajax.verify_resume --config=configs/quickstart.py --workdir=runs/proof
"""

import dataclasses
from pathlib import Path

from llamajax.config import RunFlags, key, parse_command_line
from llamajax.proving.resume_proof import ProofOptions, prove, train_arguments
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofFlags(RunFlags):
    """Flags of `verify_resume`."""

    workdir: str = key("directory for the runs of the proof alone", metavar="DIR", is_path=True)
    kills: int = key("how often it is killed", metavar="N", default=3, at_least=1)
    seed: int = key("seed of the moments", metavar="S", default=0)
    steps: int = key("steps of each run", metavar="N", default=12, at_least=6)
    other: str | None = key(
        "config keys of the other mesh, as mesh.fsdp=4,mesh.tensor=2; none: chosen here",
        metavar="KEY=VALUE,...",
        default=None,
    )
    processes: int | None = key(
        "resume the run with the other mesh as N processes of this machine; none: as one",
        metavar="N",
        default=None,
        at_least=2,
    )


def main(argv: list[str]) -> int:
    """Return 0 if it is proven, 1 if not, 2 if the config does not train."""
    flags = parse_command_line(argv, ProofFlags, verb="verify_resume", doc=__doc__)
    own = ("workdir", "kills", "seed", "steps", "other", "processes")
    options = ProofOptions(
        train=train_arguments(argv, own),
        config=flags.config,
        workdir=Path(flags.workdir),
        **{name: getattr(flags, name) for name in own[1:]},
    )
    return 0 if prove(options) else 1


if __name__ == "__main__":
    run_verb(main)
