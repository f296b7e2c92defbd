"""Prints what the compiled step reads and writes besides its products, by kind, as one table.

    python benchmarks/program_bytes.py --config=configs/llama2_7b_1gpu.py --devices=h200:1
    python benchmarks/program_bytes.py --hlo=program.txt

It compiles the step for absent devices, as `llamajax.plan` does, and counts the bytes of every
instruction that runs, loops multiplied out: operands and results, of a slice of a stack only the
slice. Caches are left out, so that a row is a lower bound on its time only where arrays are large.
--unfilled_scans tries a program whose loops stack their outputs in memory that is not filled with
zeros first: JAX itself fills it, and XLA copies these zeros where several stacks have one shape.
"""

import argparse
import collections
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import UserError
from llamajax.files import write_file
from llamajax.planning.hlo import Instruction, Program, bytes_of
from llamajax.planning.hlo_products import flops_of
from llamajax.verbs import run_verb

_NO_BYTES = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
    "call", "after-all", "iota", "partition-id", "replica-id", "optimization-barrier",
    "fusion-done", "async-done", "copy-done",
}  # fmt: skip
_KERNEL = re.compile(r'custom_call_target="(__cudnn|__cublas|tpu_custom_call)')
_UNITS = {"GB": 1e9, "kB": 1e3}
_SLICES = ("dynamic-slice", "slice", "gather")


def rows(text: str) -> list[tuple[str, float, str]]:
    """Return (kind, bytes read and written in a step, name) of each instruction of a program."""
    program, found = Program(text), []
    called = {
        name
        for instructions in program.computations.values()
        for i in instructions.values()
        if i.operation not in ("call", "while", "conditional")
        for name in i.called
    }
    for computation, count in program.counts.items():
        if computation in called:
            continue
        for i in program.computations[computation].values():
            if i.operation in _NO_BYTES or "AllocateBuffer" in i.attributes:
                continue
            body = program.computations[i.called[0]] if "fusion" in i.operation else {}
            read, written = _fusion_bytes(body) if body else _plain_bytes(i)
            kind = _kind(i, body, in_entry=computation == program.entry)
            found.append((kind, float(count * (read + written)), i.name))
    return found


def _kind(i: Instruction, body: Mapping[str, Instruction], *, in_entry: bool) -> str:
    """Return the kind of an instruction; body: of its fusion."""
    parts = [x for x in body.values() or [i] if "[]" not in x.result]  # no scalars of an index
    operations = {x.operation for x in parts}
    working = operations - {"parameter", "bitcast", "constant", "tuple", "reshape", *_SLICES}
    if _KERNEL.search(i.attributes) or any(map(flops_of, body.values())):
        return "products and kernels"
    if working <= {"broadcast"} and not operations & {*_SLICES}:
        return "filling with one value"
    if working <= {"copy", "transpose", "copy-start"} and not operations & {*_SLICES}:
        return "copies"
    if working <= {"convert"} and "convert" in working:
        return "casts"
    if working <= {"dynamic-update-slice", "fusion-start", "async-start"}:
        return "slices of stacks, read or written"
    return "after the gradients: norms and update" if in_entry else "other element-wise work"


def _plain_bytes(i: Instruction) -> tuple[int, int]:
    if i.operation == "dynamic-slice":
        return bytes_of(i.result), bytes_of(i.result)
    if i.operation == "dynamic-update-slice":
        return (bytes_of(i.operand_types[1]),) * 2
    return sum(map(bytes_of, i.operand_types)), bytes_of(i.result)


def _fusion_bytes(body: Mapping[str, Instruction]) -> tuple[int, int]:
    """Return the bytes that a fusion reads and writes, of stacks the slices alone."""
    users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
    for x in body.values():
        for position, operand in enumerate(x.operands):
            users[operand].append((x, position))
    *_, root = body.values()
    written = 0
    for result in [body[o] for o in root.operands] if root.operation == "tuple" else [root]:
        while result.operation == "bitcast":
            result = body[result.operands[0]]
        in_place = result.operation == "dynamic-update-slice"
        written += bytes_of(result.operand_types[1] if in_place else result.result)
    read = 0
    for parameter in (x for x in body.values() if x.operation == "parameter"):
        whole, total, left = bytes_of(parameter.result), 0, list(users[parameter.name])
        while left:
            user, position = left.pop()
            if user.operation == "bitcast":
                left += users[user.name]
            elif user.operation in _SLICES and position == 0:
                total += bytes_of(user.result)
            elif user.operation != "dynamic-update-slice" or position > 0:
                total += whole
        read += min(whole, total)
    return read, written


@contextlib.contextmanager
def unfilled_scans() -> Iterator[None]:
    """Have JAX leave the stacked outputs of loops unfilled while a program is lowered.

    An experiment on a private function of JAX 0.10.2 to 0.12.0. Its comment says that JAX will do
    this itself once XLA is fixed. Not for training.
    """
    import jax
    from jax._src.lax.control_flow import loops

    filled = loops._empty_array

    def empty_array(prefix: Any, spec: Any, aval: Any) -> jax.Array:
        if aval.memory_space != jax.memory.Space.Device:
            return filled(prefix, spec, aval)
        array = jax.lax.empty((*prefix, *aval.shape), aval.dtype)
        return jax.lax.pcast(array, tuple(aval.manual_axis_type.varying), to="varying")

    loops._empty_array = empty_array
    try:
        yield
    finally:
        loops._empty_array = filled


def compiled_text(flags: argparse.Namespace) -> tuple[str, float]:
    """Return the compiled step for absent devices, and the bytes/s of their memory."""
    from llamajax.backends import absent_devices
    from llamajax.config import load
    from llamajax.planning.compilation import abstract_step, lowered_step

    overrides = dict(text.removeprefix("--config.").split("=", 1) for text in flags.overrides)
    config = load(flags.config, overrides)
    target = absent_devices(flags.devices, config.backend)
    step = abstract_step(config, target)
    with unfilled_scans() if flags.unfilled_scans else contextlib.nullcontext():
        lowered = lowered_step(step)
    text = step.compiler_options.compile(lowered).as_text()
    return text, target.entry.hbm_bytes_per_s if target.entry else 0.0


def table(found: list[tuple[str, float, str]], rate: float, unit: str) -> str:
    """Return the table; rate: bytes/s of the memory, 0 where unknown."""
    sums: collections.Counter[str] = collections.Counter()
    largest: dict[str, tuple[float, str]] = {}
    for kind, size, name in found:
        sums[kind] += size
        largest[kind] = max(largest.get(kind, (0.0, "")), (size, name))
    lines = [f"| read and written | {unit} a step | ms at full speed of the memory | largest |"]
    lines.append("| --- | ---: | ---: | --- |")
    for kind, size in sums.most_common():
        ms = f"{size / rate * 1e3:.1f}" if rate else ""
        lines.append(f"| {kind} | {size / _UNITS[unit]:.1f} | {ms} | {largest[kind][1]} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compile or read a program, and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a config file, as for llamajax.plan")
    parser.add_argument("--devices", default="h200:1", help="as for llamajax.plan")
    parser.add_argument("--unfilled_scans", action="store_true", help="an experiment, see above")
    parser.add_argument("--hlo", type=Path, help="compiled program: read; with --config: written")
    parser.add_argument("--unit", choices=_UNITS, default="GB")
    flags, flags.overrides = parser.parse_known_args(argv)
    if odd := [text for text in flags.overrides if not re.match(r"--config\.\w+\.\w+=", text)]:
        raise UserError(f"{odd[0]}: unknown; config keys are --config.SECTION.KEY=VALUE")
    if not flags.config and not flags.hlo:
        raise UserError("give --config, or --hlo with the text of a compiled program")
    if flags.config:
        text, rate = compiled_text(flags)
        if flags.hlo:
            write_file(flags.hlo, text)
    else:
        text, rate = flags.hlo.read_text(encoding="utf-8"), 0.0
    print(table(rows(text), rate, flags.unit))


if __name__ == "__main__":
    run_verb(main)
