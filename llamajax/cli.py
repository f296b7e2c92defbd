"""The command `llamajax VERB ...`: run the module `llamajax.VERB` as `python -m` would."""

import ast
import runpy
import sys
from pathlib import Path

from llamajax.config import PRESETS
from llamajax.config.command_line import answer_help
from llamajax.config.config_file import packaged_configs
from llamajax.errors import UserError, did_you_mean, nearest
from llamajax.models.counts import num_parameters
from llamajax.verbs import run_verb

_NOT_VERBS = ("__init__", "__main__", "cli", "errors", "files", "verbs")
_USAGE = """llamajax: pretrain Llama-2 and Llama-3 class models on any accelerator that JAX can see.

Usage:
  llamajax VERB [--FLAG=VALUE ...]     (or python -m llamajax.VERB)

Example:
  llamajax train --config=configs/quickstart.py --workdir=runs/quickstart

Lists:
  llamajax configs       runs that --config=NAME finds, and what each is for
  llamajax presets       model architectures for preset(NAME) in a config file

Verbs (llamajax VERB --help tells more):"""


def verbs() -> dict[str, str]:
    """Return the verbs, each with the first line of its docstring; import none of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {path.stem: _first_line(path) for path in files if path.stem not in _NOT_VERBS}


def _first_line(path: Path) -> str:
    """Return the first line of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def help_text() -> str:
    """Return the text of `llamajax --help`."""
    return "\n".join([_USAGE, *(f"  {name:<14}{doc}" for name, doc in verbs().items())])


def configs_text() -> str:
    """Return a line for each config of the package: its name, and the first of its docstring."""
    found = packaged_configs()
    lines = [f"{name:<22}{_first_line(path)}" for name, path in found.items()]
    return "\n".join([*lines, "", "--config=NAME uses one; `train --dry_run` shows all its values"])


def presets_text() -> str:
    """Return a table of the published architectures."""
    rows = ["name                parameters layers  hidden  heads/kv  vocabulary  context"]
    for name, m in PRESETS.items():
        heads = f"{m.num_heads}/{m.num_kv_heads}"
        rows.append(
            f"{name:<15}{num_parameters(m):>14,}{m.num_layers:>7}{m.hidden_size:>8}{heads:>10}"
            f"{m.vocab_size:>12,}{m.max_seq_len:>9,}"
        )
    return "\n".join(rows)


def dispatch(argv: list[str]) -> None:
    """Run the verb named first, with the rest as its command line; it ends the process itself.

    Raises:
        UserError: no verb, or none of this name.
    """
    answer_help(["--help"] if argv[:1] == ["help"] else argv[:1], lambda _: help_text())
    known = verbs()
    if argv and (list_text := {"configs": configs_text, "presets": presets_text}.get(argv[0])):
        if argv[1:] not in ([], ["--help"]):
            raise UserError(f"llamajax {argv[0]} takes no arguments: leave out {argv[1]}")
        print(list_text())
        return
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
