"""`python -m llamajax.plan`: what a run takes on devices that need not be here: memory, speed."""

import json
from pathlib import Path

from llamajax.config import Flag, parse_command_line
from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.verbs import run_verb

SUMMARY = (
    "Compile the step that train would run, for devices that need not be here, and tell its "
    "memory, its communication and its predicted time."
)
EXAMPLE = """python -m llamajax.plan --config=configs/llama3_70b.py --devices=v5p:4x4x4
python -m llamajax.plan --config=configs/llama2_7b.py --devices='2*v5p:2x2x2' --config.mesh.data=2
python -m llamajax.plan --config=configs/llama2_7b.py --devices=h100:8 --search"""

_FLAGS = (
    Flag(
        name="devices",
        metavar="KIND:SHAPE",
        doc="v4, v5p, tpu7x:AxBxC and v5e, v6e:AxB in chips; a100, h100, h200, b200:N in nodes of "
        "8, or :HxD for hosts x devices a host; cpu:N virtual devices; or PLUGIN:TOPOLOGY. "
        "'N*KIND:SHAPE' for N slices of TPUs, or N NVLink domains of so many GPUs",
    ),
    Flag(
        name="search",
        annotation=bool,
        default=False,
        doc="try other meshes, recomputation and accumulation; rank what fits by predicted speed",
    ),
    Flag(
        name="candidates",
        metavar="N",
        annotation=int,
        default=4,
        doc="with --search: how many that fit to compile, the most promising first",
    ),
    Flag(
        name="json",
        metavar="OUT",
        annotation=str | None,
        default=None,
        doc="also write the plan as a JSON object; with --search the best one, and all in `search`",
    ),
    Flag(
        name="fresh",
        annotation=bool,
        default=False,
        doc="compile again even where an earlier plan of the same program is stored",
    ),
)


def main(argv: list[str]) -> int:
    """Print the plan; exit code 0 whenever one was computed, also where it does not fit."""
    flags = parse_command_line(argv, verb="plan", flags=_FLAGS, summary=SUMMARY, example=EXAMPLE)
    if flags.candidates < 1:
        raise UserError(f"--candidates={flags.candidates}: must be 1 or more")
    if flags.json and not Path(flags.json).absolute().parent.is_dir():
        raise UserError(f"--json={flags.json}: there is no directory to write it in")
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax import backends
    from llamajax.planning import printed_plan as output
    from llamajax.planning.planner import make_plan
    from llamajax.planning.search import search

    target = backends.absent_devices(flags.devices, flags.config.backend)
    cache = None if flags.fresh else backends.cache_directory("plans")
    if flags.search:
        plans = search(flags.config, target, cache=cache, wanted=flags.candidates)
        print("\n".join(output.search_lines(plans)), end="\n\n")
    else:
        say(f"compiling for {target.text} ...")
        plans = [make_plan(flags.config, target, cache=cache)]
    print("\n".join(output.text_lines(plans[0])))
    if flags.json:
        rows = [output.to_json(plan, config_file=flags.config_file) for plan in plans]
        found = rows[0] | ({"search": rows} if flags.search else {})
        text = json.dumps(found, indent=1) + "\n"
        write_file(Path(flags.json), text, label=f"--json={flags.json}")
    return 0


if __name__ == "__main__":
    run_verb(main)
