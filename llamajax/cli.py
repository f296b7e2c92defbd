"""The command `llamajax VERB ...`: run the module `llamajax.VERB` as `python -m` would."""

import ast
import runpy
import sys
from pathlib import Path

from llamajax.config.command_line import answer_help
from llamajax.errors import UserError, did_you_mean, nearest
from llamajax.verbs import run_verb

_NOT_VERBS = ("__init__", "__main__", "cli", "errors", "files", "verbs")
_USAGE = """llamajax: pretrain Llama-2 and Llama-3 class models on any accelerator that JAX can see.

Usage:
  llamajax VERB [--FLAG=VALUE ...]     (or python -m llamajax.VERB)

Example:
  llamajax train --config=configs/quickstart.py --workdir=runs/quickstart

Verbs (llamajax VERB --help tells more):"""


def verbs() -> dict[str, str]:
    """Return the verbs, each with the first line of its docstring; import none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in _NOT_VERBS:
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = docstring.partition("\n")[0]
    return found


def help_text() -> str:
    """Return the text of `llamajax --help`."""
    return "\n".join([_USAGE, *(f"  {name:<14}{doc}" for name, doc in verbs().items())])


def dispatch(argv: list[str]) -> None:
    """Run the verb named first, with the rest as its command line; it ends the process itself.

    Raises:
        UserError: no verb, or none of this name.
    """
    answer_help(["--help"] if argv[:1] == ["help"] else argv[:1], help_text)
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


def main() -> None:
    """Run the installed command and exit with the verb's code."""
    run_verb(dispatch)
