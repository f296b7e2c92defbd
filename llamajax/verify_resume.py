"""Prove that a run of this config can be killed at any time.

It trains a few steps undisturbed, again with SIGKILL at random moments (also in a save), and
resumes on this mesh and on another: the losses must agree, bit by bit on the same mesh.

Example:
  python -m llamajax.verify_resume --config=configs/quickstart.py --workdir=runs/proof
"""

from llamajax.config import parse_command_line
from llamajax.proving.resume_proof import ProofOptions, prove
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Return 0 if it is proven, 1 if not, 2 if the config does not train."""
    options = parse_command_line(argv, ProofOptions, verb="verify_resume", doc=__doc__)
    return 0 if prove(options) else 1


if __name__ == "__main__":
    run_verb(main)
