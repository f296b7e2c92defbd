"""The command `llamajax VERB ...`: runs the module `llamajax.VERB` as `python -m` would."""

import ast
import runpy
import sys
from pathlib import Path

from llamajax.config import did_you_mean, nearest
from llamajax.errors import UserError
from llamajax.verbs import run_verb

_NOT_VERBS = ("__init__", "__main__", "cli", "errors", "verbs")
_USAGE = """llamajax: pretrain Llama-2 and Llama-3 class models on any accelerator that JAX can see.

Usage:
  llamajax VERB [--FLAG=VALUE ...]     (or python -m llamajax.VERB)

Example:
  llamajax train --config=configs/quickstart.py --workdir=runs/quickstart

Verbs (llamajax VERB --help tells more):"""


def verbs() -> dict[str, str]:
    """The verbs that exist, each with the first line of its docstring; imports none of them."""
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem not in _NOT_VERBS)
    return {name: _first_line(folder / f"{name}.py") for name in names}


def help_text() -> str:
    """The text of `llamajax --help`."""
    lines = [f"  {name:<14}{summary}" for name, summary in verbs().items()]
    return "\n".join([_USAGE, *lines])


def dispatch(argv: list[str]) -> int:
    """Run the verb named first with the rest as its command line; it ends the process itself.

    Raises:
        UserError: no verb, or none of this name.
    """
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        print(help_text())
        return 0
    known = verbs()
    if not argv:
        raise UserError(f"no verb given; one of {', '.join(known)} (llamajax --help)")
    verb, rest = argv[0].replace("-", "_"), argv[1:]
    if verb not in known:
        raise UserError(
            f"unknown verb {argv[0]!r}{did_you_mean(nearest(verb, known)) or '.'} "
            f"Verbs: {', '.join(known)} (llamajax --help)"
        )
    module = f"llamajax.{verb}"
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def main() -> None:
    """The entry point of the installed command: exits with the verb's code."""
    run_verb(dispatch)


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = docstring.partition("\n")[0]
    return line.removeprefix(f"`python -m llamajax.{path.stem}`: ")
