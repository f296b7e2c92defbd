"""Parse a compiled program's text: its computations, how often each runs, and its collectives.

The text is XLA's own (`compiled.as_text()`), after all its optimizations. A loop's body is written
once and runs many times: every computation is visited from the entry on with the number of times
that it runs. XLA's CPU and GPU compilers write the trip count of a loop beside it; for others it is
read from the loop's condition and the start of its counter.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_KERNELS = re.compile(r'custom_call_target="(?:__cudnn\$|tpu_custom_call)')
# libtpu hides a collective behind a chain of fusions, each of which names it again; only the first
# starts it.
_IN_CHAIN = 'chain_id="'
_STARTS_CHAIN = 'custom_call_target="AsyncCollectiveStart"'
# Between slices of TPUs libtpu hands an array to the hosts; attributes say what they do with it.
_BY_HOSTS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_HOSTS_TARGET = re.compile(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})')
_HOSTS_KINDS = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
_AFTER_GROUPS = re.compile(
    r", (?:use_global|to_apply|dimensions|channel|metadata|frontend|backend|split|constrain)"
    r"|, [a-z_]+=(?!\()"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its result type, operation, operands, and the rest.

    operands: by name; of a constant its value. operand_types: of each operand, "" of a value.
    """

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    operand_types: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs.

        Of a condition's branches it is the last, that of true: a step's conditions are true as a
        rule.
        """
        found = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            found += _OPERAND.findall(branches)[-1:]
        return found

    @property
    def is_attention_kernel(self) -> bool:
        """Whether it calls a fused attention kernel."""
        return _KERNELS.search(self.attributes) is not None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    operand_bytes: of one device and one call; count: calls a step; groups: the text of its replica
    groups or of its source-target pairs. between_slices: it goes over the network between slices of
    TPUs, and its groups hold device ids, not positions in the mesh.
    """

    kind: str
    groups: str
    dtype: str
    operand_bytes: int
    count: int
    between_slices: bool = False


class Program:
    """A compiled program, parsed.

    computations: by name, and the instructions of each by name, in the program's order.
    is_in_launch_order: whether that order tells what runs beside a collective.
    """

    def __init__(self, text: str):
        self.is_in_launch_order = "is_scheduled=true" in text
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        for line in text.splitlines():
            header = None if line.startswith(" ") else _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif self.computations and (found := _NAME.match(line)):
                current[found[1]] = _instruction(found[1], line[found.end() :], current)
        assert self.entry, "this text is not a compiled program of XLA"

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        """How often a run executes each computation, by name."""
        counts: collections.Counter[str] = collections.Counter()

        def visit(name: str, count: int) -> None:
            counts[name] += count
            for i in self.computations[name].values():
                times = count * self.turns(i, name)
                for called in i.called:
                    visit(called, times)

        visit(self.entry, 1)
        return counts

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Yield each instruction that runs, and how often."""
        for name, count in self.counts.items():
            for instruction in self.computations[name].values():
                yield instruction, count

    def inner(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions of the computations that an instruction calls."""
        return [i for name in instruction.called for i in self.computations[name].values()]

    def turns(self, loop: Instruction, caller: str) -> int:
        """Return how often a loop in the computation `caller` turns; 1 for what is no loop."""
        if loop.operation != "while":
            return 1
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        counters = [i for i in condition.values() if i.operation == "get-tuple-element"]
        inside = [j for i in condition.values() for j in (i, *self.inner(i))]
        limits = [i for i in inside if i.operation == "constant" and i.result.startswith("s")]
        if len(limits) != 1 or len(counters) != 1:
            raise ValueError(f"loop {loop.name}: its condition does not tell its trip count")
        index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
        # The first value of the counter; 0 where it is not written as a constant.
        outside = self.computations[caller]
        start = outside.get(loop.operands[0])
        start = outside.get(start.operands[index]) if start and start.operation == "tuple" else None
        while start and start.operation in ("copy", "bitcast", "convert"):
            start = outside.get(start.operands[0])
        first = int(start.operands[0]) if start and start.operation == "constant" else 0
        return int(limits[0].operands[0]) - first

    def collectives(self) -> list[Collective]:
        """Return every collective that a run of the program executes."""
        return [c for name, count in self.counts.items() for c in self.collectives_in(name, count)]

    def collectives_in(self, name: str, count: int = 1) -> Iterator[Collective]:
        """Yield the collectives of one computation, which runs `count` times."""
        instructions = self.computations[name].values()
        starts = {o for i in instructions if _STARTS_CHAIN in i.attributes for o in i.operands}
        for i in instructions:
            if _IN_CHAIN in i.attributes and i.name not in starts:
                continue
            if found := _collective(i, name, count):
                yield found

    def started_by(self, i: Instruction, caller: str) -> Collective | None:
        """Return the collective that an instruction of the computation `caller` is or starts."""
        if i.operation == "send" or i.operation.removesuffix("-start") in KINDS:
            return None if _IN_CHAIN in i.attributes else _collective(i, caller, 1)
        if i.operation in ("async-start", "call-update", "fusion"):
            start = i
            if i.operation == "call-update":  # on another thread, which the call before it names
                start = self.computations[caller][i.operands[0]]
            return next(self.collectives_in(start.called[0]), None)
        return None


def bytes_of(types: str) -> int:
    """Return the bytes of all arrays in a type, `f32[8,128]{1,0:T(8,128)}` or a tuple of such."""
    total = 0
    for dtype, dims in _ARRAY.findall(types):
        bits = _BITS.get(dtype) or int(re.sub(r"^\D+(\d+).*", r"\1", dtype))
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def array_shape(types: str) -> list[int]:
    """Return the sizes of the first array in a type."""
    return [int(d) for d in _ARRAY.search(types)[2].split(",") if d]


def _instruction(name: str, rest: str, before: Mapping[str, Instruction]) -> Instruction:
    """Parse `TYPE operation(operands), attributes`; a tuple's type is in parentheses."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    operation, inside = rest[:begin], rest[begin + 1 : end]
    operands = (inside,) if operation == "constant" else tuple(_OPERAND.findall(inside))
    operand_types = tuple(before[o].result if o in before else "" for o in operands)
    return Instruction(name, result, operation, operands, operand_types, rest[end + 1 :])


def _closing(text: str, begin: int) -> int:
    """Return the index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[begin : begin + 80]}")


def _collective(i: Instruction, computation: str, count: int) -> Collective | None:
    """Return the collective that an instruction of a computation is; None for any other."""
    by_hosts = _BY_HOSTS.search(i.attributes) if i.operation == "send" else None
    kind = _HOSTS_KINDS[by_hosts[1]] if by_hosts else i.operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    # libtpu writes a reduce-scatter as an all-reduce in a fusion of this name
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    # the second operand of a send only orders it among others
    operands = " ".join(i.operand_types[:1] if by_hosts else i.operand_types)
    dtypes = {dtype: bytes_of(f"{dtype}[{dims}]") for dtype, dims in _ARRAY.findall(operands)}
    return Collective(
        kind=kind,
        groups=_groups(i.attributes),
        dtype=max(dtypes, key=dtypes.get),
        operand_bytes=bytes_of(operands),
        count=count,
        between_slices=by_hosts is not None,
    )


def _groups(attributes: str) -> str:
    """Return the text of the groups: lists, an iota, a mesh with axes, pairs, or hosts' targets."""
    if found := _HOSTS_TARGET.search(attributes):
        return found[1].strip('"')
    for key in ("replica_groups=", "source_target_pairs="):
        _, found, rest = attributes.partition(key)
        if found:
            return _AFTER_GROUPS.split(rest)[0]
    return ""
