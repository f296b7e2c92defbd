"""`python -m llamajax.verify_resume`: prove that a run of this config can be killed at any time."""

from pathlib import Path

from llamajax.config import parse_command_line
from llamajax.config.flags import Flag
from llamajax.errors import UserError
from llamajax.proving.resume_proof import ProofOptions, prove, train_arguments
from llamajax.verbs import run_verb

SUMMARY = (
    "Train a few steps undisturbed, again with SIGKILL at random moments (also in a save), and "
    "resume on this mesh and on another: the losses must agree, bit by bit on the same mesh."
)
EXAMPLE = "python -m llamajax.verify_resume --config=configs/quickstart.py --workdir=runs/proof"
FLAGS = (
    Flag(name="workdir", metavar="DIR", doc="directory for the runs of the proof alone"),
    Flag(name="kills", metavar="N", annotation=int, default=3, doc="how often it is killed"),
    Flag(name="seed", metavar="S", annotation=int, default=0, doc="seed of the moments"),
    Flag(name="steps", metavar="N", annotation=int, default=12, doc="steps of each run"),
    Flag(
        name="other",
        metavar="KEY=VALUE,...",
        annotation=str | None,
        default=None,
        doc="config keys of the other mesh, as mesh.fsdp=4,mesh.tensor=2; none: chosen here",
    ),
    Flag(
        name="processes",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="resume the run with the other mesh as N processes of this machine; none: as one",
    ),
)


def main(argv: list[str]) -> int:
    """Exit code: 0 proven, 1 not proven, 2 the config does not train."""
    command = parse_command_line(
        argv, verb="verify_resume", flags=FLAGS, summary=SUMMARY, example=EXAMPLE
    )
    for name, least in (("kills", 1), ("steps", 6)):
        if getattr(command, name) < least:
            raise UserError(f"--{name}={getattr(command, name)}: must be at least {least}")
    if command.processes is not None and command.processes < 2:
        raise UserError(f"--processes={command.processes}: must be at least 2; leave it out for 1")
    options = ProofOptions(
        train=train_arguments(argv, [flag.name for flag in FLAGS]),
        config=command.config,
        workdir=Path(command.workdir),
        steps=command.steps,
        kills=command.kills,
        seed=command.seed,
        other=command.other,
        processes=command.processes,
    )
    return 0 if prove(options) else 1


if __name__ == "__main__":
    run_verb(main)
