"""Predict memory, communication and speed of a run on devices that need not be here.

It compiles the step that `train` would run.

Example:
  python -m llamajax.plan --config=configs/llama3_70b.py --devices=v5p:4x4x4
  python -m llamajax.plan --config=configs/llama2_7b.py --devices='2*v5p:2x2x2' --config.mesh.data=2
  python -m llamajax.plan --config=configs/llama2_7b.py --devices=h100:8 --search
"""

import dataclasses
import json
from pathlib import Path

from llamajax.config import RunFlags, key, parse_command_line
from llamajax.config.forms import check_output
from llamajax.errors import say
from llamajax.files import write_file
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(RunFlags):
    """Flags of `plan`."""

    devices: str = key(
        "v4, v5p, tpu7x:AxBxC and v5e, v6e:AxB in chips; a100, h100, h200, b200:N in nodes of 8, "
        "or :HxD for hosts x devices a host; cpu:N virtual devices; or PLUGIN:TOPOLOGY. "
        "'N*KIND:SHAPE' for N slices of TPUs, or N NVLink domains of so many GPUs",
        metavar="KIND:SHAPE",
    )
    search: bool = key(
        "try other meshes, recomputation and accumulation; rank what fits by predicted speed",
        default=False,
    )
    candidates: int = key(
        "with --search: how many that fit to compile, the most promising first",
        metavar="N",
        default=4,
        at_least=1,
    )
    json: str | None = key(
        "also write the plan as a JSON object; with --search the best one, and all in `search`",
        metavar="OUT",
        default=None,
        is_path=True,
        check=check_output,
    )
    fresh: bool = key(
        "compile again even where an earlier plan of the same program is stored", default=False
    )


def main(argv: list[str]) -> int:
    """Print the plan; return 0 whenever one was computed, also where it does not fit."""
    flags = parse_command_line(argv, PlanFlags, verb="plan", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax import backends
    from llamajax.planning import printed_plan
    from llamajax.planning.planner import make_plan
    from llamajax.planning.search import search

    target = backends.absent_devices(flags.devices, flags.config.backend)
    cache = None if flags.fresh else backends.cache_directory("plans")
    if flags.search:
        plans = search(flags.config, target, cache=cache, wanted=flags.candidates)
        print("\n".join(printed_plan.search_lines(plans)), end="\n\n")
    else:
        say(f"compiling for {target.text} ...")
        plans = [make_plan(flags.config, target, cache=cache)]
    print("\n".join(printed_plan.text_lines(plans[0])))
    if flags.json:
        rows = [printed_plan.to_json(plan, config_file=flags.config_file) for plan in plans]
        found = rows[0] | ({"search": rows} if flags.search else {})
        text = json.dumps(found, indent=1) + "\n"
        write_file(Path(flags.json), text, label=f"--json={flags.json}")
    return 0


if __name__ == "__main__":
    run_verb(main)
