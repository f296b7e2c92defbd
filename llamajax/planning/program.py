"""A compiled program as text, read: which collectives run, how often, and on how many bytes.

The text is XLA's own (`compiled.as_text()`), after all its optimisations. A loop's body is written
once and runs many times: every computation is visited from the entry on with the number of times
that it runs. XLA's CPU and GPU compilers write the trip count of a loop beside it; for others it is
read from the loop's condition and the start of its counter.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# libtpu hides a collective behind a chain of fusions, each of which names it again; only the first
# starts it.
_CHAINED = re.compile(r'chain_id="')
_STARTS_CHAIN = 'custom_call_target="AsyncCollectiveStart"'
# Between slices of TPUs libtpu hands an array to the hosts, which are told what to do with it.
_BY_HOSTS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_HOSTS_KINDS = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its result type, operation, operands by name, and the rest."""

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    operand_bytes: of one device and one call; count: calls a step; groups: the text of its replica
    groups or of its source-target pairs. between_slices: it goes over the network between slices of
    TPUs, and its groups are of devices' ids, not of places in the mesh.
    """

    kind: str
    groups: str
    dtype: str
    operand_bytes: int
    count: int
    between_slices: bool = False


def collectives(text: str) -> list[Collective]:
    """Every collective that a run of the compiled program `text` executes."""
    computations, entry = _parse(text)
    counts: dict[str, int] = {}
    _visit(computations, entry, 1, counts)
    return [
        collective
        for name, count in counts.items()
        for collective in _collectives_of(name, computations[name], count)
    ]


def bytes_of(types: str) -> int:
    """Bytes of all arrays in a type, `f32[8,128]{1,0:T(8,128)}` or a tuple of such."""
    total = 0
    for dtype, dims in _ARRAY.findall(types):
        bits = _BITS.get(dtype) or int(re.sub(r"^\D+(\d+).*", r"\1", dtype))
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _NAME.match(line)):
            current.append(_instruction(found[1], line[found.end() :]))
    assert entry, "this text is not a compiled program of XLA"
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    """`rest`: `TYPE operation(operands), attributes`; a tuple's type is in parentheses."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    operands = tuple(_OPERAND.findall(rest[begin:end]))
    if rest.startswith("constant"):
        operands = (rest[begin + 1 : end],)
    return Instruction(name, result, rest[:begin], operands, rest[end + 1 :])


def _closing(text: str, begin: int) -> int:
    """Place of the parenthesis that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[begin : begin + 80]}")


def _visit(
    computations: dict[str, list[Instruction]], name: str, count: int, counts: dict[str, int]
) -> None:
    """Add `count` runs of a computation, and of what it calls, to `counts`."""
    counts[name] = counts.get(name, 0) + count
    for instruction in computations[name]:
        attributes = instruction.attributes
        times = count
        if instruction.operation == "while":
            times = count * _trip_count(instruction, computations, computations[name])
        called = _CALLED.findall(attributes)
        for branches in _BRANCHES.findall(attributes):
            called += _OPERAND.findall(branches)
        for other in called:
            _visit(computations, other, times, counts)


def _trip_count(
    loop: Instruction, computations: dict[str, list[Instruction]], around: list[Instruction]
) -> int:
    known = _TRIP_COUNT.search(loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    inside = {i.name: i for i in computations[condition[1]]}
    limits = [i for i in inside.values() if i.operation == "constant" and i.result.startswith("s")]
    counters = [i for i in inside.values() if i.operation == "get-tuple-element"]
    if len(limits) != 1 or len(counters) != 1:
        raise ValueError(f"the trip count of loop {loop.name} cannot be read from its condition")
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    return int(limits[0].operands[0]) - _start(loop, index, {i.name: i for i in around})


def _start(loop: Instruction, index: int, around: dict[str, Instruction]) -> int:
    """First value of the loop's counter; 0 where it is not written as a constant."""
    found = around.get(loop.operands[0])
    found = around.get(found.operands[index]) if found and found.operation == "tuple" else None
    while found and found.operation in ("copy", "bitcast", "convert"):
        found = around.get(found.operands[0])
    return int(found.operands[0]) if found and found.operation == "constant" else 0


def _collectives_of(name: str, instructions: list[Instruction], count: int) -> Iterator[Collective]:
    types = {i.name: i.result for i in instructions}
    starts = {
        operand for i in instructions if _STARTS_CHAIN in i.attributes for operand in i.operands
    }
    for i in instructions:
        by_hosts = _BY_HOSTS.search(i.attributes) if i.operation == "send" else None
        kind = _HOSTS_KINDS[by_hosts[1]] if by_hosts else i.operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        if _CHAINED.search(i.attributes) and i.name not in starts:
            continue
        # libtpu writes a reduce-scatter as an all-reduce in a fusion of this name
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        sent = i.operands[:1] if by_hosts else i.operands  # the other one orders sends
        operands = " ".join(types[operand] for operand in sent)
        dtypes = {dtype: bytes_of(f"{dtype}[{dims}]") for dtype, dims in _ARRAY.findall(operands)}
        yield Collective(
            kind=kind,
            groups=_groups(i.attributes),
            dtype=max(dtypes, key=dtypes.get),
            operand_bytes=bytes_of(operands),
            count=count,
            between_slices=by_hosts is not None,
        )


def _groups(attributes: str) -> str:
    """The text of the groups: lists, an iota, a mesh with axes, pairs, or what hosts are told."""
    if found := re.search(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})', attributes):
        return found[1].strip('"')
    for key in ("replica_groups=", "source_target_pairs="):
        begin = attributes.find(key)
        if begin >= 0:
            rest = attributes[begin + len(key) :]
            return re.split(r", (?:use_global|to_apply|dimensions|channel|metadata|frontend|"
                            r"backend|split|constrain)|, [a-z_]+=(?!\()", rest)[0]  # fmt: skip
    return ""
