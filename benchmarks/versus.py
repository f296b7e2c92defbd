"""Prints the training step beside those of other systems, alternating in one run.

    python benchmarks/versus.py --systems=llamajax,torch,litgpt,maxtext [--dtype=bfloat16]
    python benchmarks/versus.py --systems=llamajax,before --source=before:../other-clone

`torch` is transformers' LlamaForCausalLM, `litgpt` its GPT, both under torch.compile; `maxtext` is
MaxText's own step. Same sizes, same initial weights, same random tokens, same AdamW and clipping
(`versus_maxtext.py` has what differs), one document a row: the losses printed at the end show it.
Each system runs in its own process and waits for its turn, so that only one computes at a time.
The order alternates from round to round. A busy machine slows all of them: read the ratios, of wall
time and of processor time.

--python=SYSTEM:PATH runs a system under another Python, for releases that do not fit together;
--source=NAME:FOLDER adds llamajax as it is in another clone. A system that is not installed is left
out, with a line that says so. torch.compile on a CPU needs a C++ compiler.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from train_step import StepFlags, run_config  # the script beside this one
from versus_systems import PACKAGES, WORK

from llamajax.config import Flags, key, parse_command_line
from llamajax.config.forms import check_output
from llamajax.config.schema import Remat, TrainDtype
from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.verbs import run_verb

KINDS = tuple(PACKAGES)
_CLOCKS = ("wall", "processor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersusFlags(Flags):
    """Flags of this script."""

    systems: tuple[str, ...] = key("a,b; llamajax first", default=KINDS)
    python: dict[str, str] | None = key(
        "systems under another Python", metavar="NAME:PATH,...", default=None
    )
    source: dict[str, str] | None = key(
        "llamajax in other clones", metavar="NAME:FOLDER,...", default=None
    )
    preset: str = key("a preset with an untied head", default="bench-32m")
    batch: int = key("samples a step", default=4, at_least=1)
    seq_len: int = key("tokens a sample", default=512, at_least=1)
    dtype: TrainDtype = key("float8: the other systems compute in bfloat16", default="float32")
    remat: Remat = key("of llamajax alone", default="dots")
    backend: Literal["cpu", "cuda"] = key("what all run on", default="cpu")
    rounds: int = key("turns of each system", default=6, at_least=1)
    steps: int = key("steps of each system a round", default=3, at_least=1)
    no_compile: bool = key("torch without torch.compile", default=False)
    json: str | None = key(
        "file to write everything measured to", default=None, is_path=True, check=check_output
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in sorted({*self.systems} - {*KINDS, *(self.source or ())}):
            yield f"--systems: no system {name!r}; systems: {','.join(KINDS)}"
        if self.systems[:1] != ("llamajax",):
            yield f"--systems={','.join(self.systems)}: llamajax comes first"

    def kind(self, name: str) -> str:
        """What a system is, one of KINDS."""
        return "llamajax" if name in (self.source or {}) else name

    def interpreter(self, name: str) -> str:
        """The Python that runs a system."""
        return (self.python or {}).get(name, sys.executable)


def work(flags: VersusFlags) -> dict[str, Any]:
    """Return what all systems are given: sizes, settings, and llamajax's flags for them."""
    given = [f"--backend={flags.backend}", f"--preset={flags.preset}", f"--dtype={flags.dtype}"]
    given += [f"--batch={flags.batch}", f"--seq_len={flags.seq_len}", f"--remat={flags.remat}"]
    given += ["--documents=0"]
    config = run_config(StepFlags.parse(given))
    if config.model.tie_embeddings:
        raise UserError(f"--preset={flags.preset}: has a tied head; choose one without")
    return {
        "flags": given,
        "model": dataclasses.asdict(config.model),
        "optim": dataclasses.asdict(config.optim),
        "dtype": "bfloat16" if flags.dtype == "float8" else flags.dtype,  # of the others
        "torch_compile": not flags.no_compile,
        "torch_device": flags.backend,
    }


class System:
    """One system in its process. losses, wall, processor: of all its steps, the first ones too."""

    def __init__(self, name: str, flags: VersusFlags, folder: Path, *, initial: bool):
        self.name = name
        clone = Path((flags.source or {}).get(name, Path(__file__).parents[1])).resolve()
        script = clone / "benchmarks" / "versus_systems.py"  # of the same version as the package
        command = [flags.interpreter(name), str(script), flags.kind(name), str(folder)]
        command += ["--initial"] * initial
        environment = dict(os.environ)
        if flags.kind(name) != name:
            environment["PYTHONPATH"] = str(clone)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.losses: list[float] = []
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.versions = json.loads(self._answer())

    def steps(self, count: int) -> dict[str, float]:
        """Take `count` steps; return the median seconds of each clock."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        for _ in range(count):
            loss, wall, processor = map(float, self._answer().split())
            self.losses.append(loss)
            self.wall.append(wall)
            self.processor.append(processor)
        return {clock: statistics.median(getattr(self, clock)[-count:]) for clock in _CLOCKS}

    def close(self) -> None:
        """End the process, which leaves when nothing more can come."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f"the process of {self.name} ended early; see its messages above")
        return answer


def installed(flags: VersusFlags) -> list[str]:
    """Return the systems whose packages their Python has; say which are left out."""
    found = []
    for name in flags.systems:
        packages, python = PACKAGES[flags.kind(name)], flags.interpreter(name)
        ask = f"import importlib.metadata as m; [m.version(n) for n in {packages!r}]"
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0:
            found.append(name)
            continue
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"{name} is left out: {python} has not all of {', '.join(packages)} ({reason})")
    return found


def compare(flags: VersusFlags) -> dict[str, Any]:
    """Run the rounds; return everything that was measured."""
    names, systems = installed(flags), {}
    if not names or names[0] != "llamajax":
        raise UserError("llamajax itself cannot run here: it needs jax, flax and optax")
    given = work(flags)
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / WORK, json.dumps(given))
        try:
            for n, name in enumerate(names):  # one after the other: the first leaves its weights
                systems[name] = System(name, flags, Path(folder), initial=n == 0)
                systems[name].steps(2)
            rounds = []
            for n in range(flags.rounds):
                turn = n % len(names)
                order = names[turn:] + names[:turn]
                order = order if n % 2 == 0 else order[::-1]
                rounds.append({name: systems[name].steps(flags.steps) for name in order})
                shown = ", ".join(f"{name} {rounds[-1][name]['wall']:.3f} s" for name in names)
                print(f"round {n + 1}: {shown}", file=sys.stderr, flush=True)
        finally:
            for system in systems.values():
                system.close()
    ratios = {
        name: {
            clock: statistics.median(r["llamajax"][clock] / r[name][clock] for r in rounds)
            for clock in _CLOCKS
        }
        for name in names[1:]
    }
    return {
        "date": str(datetime.date.today()),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "work": given,
        "steps": flags.steps,
        "systems": {
            name: {"versions": s.versions, "losses": s.losses, "wall": s.wall,
                   "processor": s.processor}
            for name, s in systems.items()
        },
        "rounds": rounds,
        "llamajax_by_other": ratios,
    }  # fmt: skip


def report(flags: VersusFlags, found: dict[str, Any]) -> str:
    """Return the tables of the rounds and of the losses."""
    systems, rounds = found["systems"], found["rounds"]
    tokens = flags.batch * flags.seq_len
    lines = [f"{found['date']}, {found['machine']}, {found['num_cpus']} CPUs"]
    for name, system in systems.items():
        versions = ", ".join(f"{k} {v}" for k, v in system["versions"].items())
        lines.append(f"{name}: {versions}")
    lines += [
        f"{flags.preset}, {flags.batch} x {flags.seq_len} tokens, {flags.dtype}"
        f"{' (others bfloat16)' if flags.dtype == 'float8' else ''}, llamajax with "
        f"remat {flags.remat}, torch {'eager' if flags.no_compile else 'compiled'}; "
        f"{len(rounds)} rounds, medians of {flags.steps} steps in each",
        "",
        "| system | wall s | tokens/s | llamajax / system | processor s | llamajax / system |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in systems:
        wall, processor = (statistics.median(r[name][clock] for r in rounds) for clock in _CLOCKS)
        ratios = [f"{found['llamajax_by_other'][name][c]:.3f}" if name != "llamajax" else ""
                  for c in _CLOCKS]  # fmt: skip
        lines.append(
            f"| {name} | {wall:.3f} | {tokens / wall:,.0f} | {ratios[0]} | {processor:.3f} "
            f"| {ratios[1]} |"
        )
    lines += ["", "| loss of step | " + " | ".join(systems) + " |"]
    lines.append("| --- |" + " ---: |" * len(systems))
    last = len(systems["llamajax"]["losses"])
    for n in sorted({1, 2, 3, last // 2, last}):
        row = " | ".join(f"{system['losses'][n - 1]:.5f}" for system in systems.values())
        lines.append(f"| {n} | {row} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Read the flags, compare, print."""
    flags = parse_command_line(argv, VersusFlags, verb="benchmarks/versus.py", doc=__doc__)
    found = compare(flags)
    if flags.json:
        write_file(Path(flags.json), json.dumps(found, indent=1) + "\n")
    print(report(flags, found))


if __name__ == "__main__":
    run_verb(main)
