"""Read a compiled program's text: its collectives, how often they run, bytes and mesh axes.

The text is XLA's own (`compiled.as_text()`), after all its optimizations. A loop's body is written
once and runs many times: every computation is visited from the entry on with the number of times
that it runs. XLA's CPU and GPU compilers write the trip count of a loop beside it; for others it is
read from the loop's condition and the start of its counter.

A program numbers its devices as the mesh lists them, the last axis fastest; the devices of one
group differ in their coordinates along the axes that are communicated over.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

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
_IDS_A_SLICE = 100_000  # libtpu numbers device 3 of the first of several slices 100003
_AFTER_GROUPS = re.compile(
    r", (?:use_global|to_apply|dimensions|channel|metadata|frontend|backend|split|constrain)"
    r"|, [a-z_]+=(?!\()"
)

_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"^mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{(.*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_USED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_SLICES = re.compile(r"^\{([\d,]+)\}x\{([\d,:]+)\}")


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
    TPUs, and its groups hold device ids, not positions in the mesh.
    """

    kind: str
    groups: str
    dtype: str
    operand_bytes: int
    count: int
    between_slices: bool = False


def executed(text: str) -> Iterator[tuple[str, list[Instruction], int]]:
    """Yield each computation of a compiled program, and how often a run executes it.

    Of a condition's branches it is the last, that of true: a step's conditions are true as a rule.
    """
    computations, entry = parse(text)
    counts: collections.Counter[str] = collections.Counter()
    _visit(computations, entry, 1, counts)
    for name, count in counts.items():
        yield name, computations[name], count


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the computations of a compiled program by name, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif computations and (found := _NAME.match(line)):
            current.append(_instruction(found[1], line[found.end() :]))
    assert entry, "this text is not a compiled program of XLA"
    return computations, entry


def collectives(text: str) -> list[Collective]:
    """Return every collective that a run of the compiled program `text` executes."""
    return [c for computation in executed(text) for c in collectives_of(*computation)]


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


def _instruction(name: str, rest: str) -> Instruction:
    """Parse `TYPE operation(operands), attributes`; a tuple's type is in parentheses."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    operands = tuple(_OPERAND.findall(rest[begin:end]))
    if rest.startswith("constant"):
        operands = (rest[begin + 1 : end],)
    return Instruction(name, result, rest[:begin], operands, rest[end + 1 :])


def _closing(text: str, begin: int) -> int:
    """Return the index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[begin : begin + 80]}")


def _visit(
    computations: dict[str, list[Instruction]],
    name: str,
    count: int,
    counts: collections.Counter[str],
) -> None:
    """Add `count` runs of a computation, and of what it calls, to `counts`."""
    counts[name] += count
    for instruction in computations[name]:
        times = count
        if instruction.operation == "while":
            times = count * trip_count(instruction, computations, computations[name])
        for other in called_by(instruction):
            _visit(computations, other, times, counts)


def called_by(instruction: Instruction) -> list[str]:
    """Return the names of the computations that an instruction runs."""
    called = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        called += _OPERAND.findall(branches)[-1:]
    return called


def trip_count(
    loop: Instruction, computations: dict[str, list[Instruction]], caller: list[Instruction]
) -> int:
    """Return how often a loop turns. `caller`: the computation that it is in."""
    known = _TRIP_COUNT.search(loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    inside = computations[condition[1]]
    counters = [i for i in inside if i.operation == "get-tuple-element"]
    fused = [name for i in inside for name in _CALLED.findall(i.attributes)]
    inside = [i for name in (condition[1], *fused) for i in computations[name]]
    limits = [i for i in inside if i.operation == "constant" and i.result.startswith("s")]
    if len(limits) != 1 or len(counters) != 1:
        raise ValueError(f"the trip count of loop {loop.name} cannot be read from its condition")
    index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
    # The first value of the counter; 0 where it is not written as a constant.
    outside = {i.name: i for i in caller}
    start = outside.get(loop.operands[0])
    start = outside.get(start.operands[index]) if start and start.operation == "tuple" else None
    while start and start.operation in ("copy", "bitcast", "convert"):
        start = outside.get(start.operands[0])
    first = int(start.operands[0]) if start and start.operation == "constant" else 0
    return int(limits[0].operands[0]) - first


def collectives_of(name: str, instructions: list[Instruction], count: int) -> Iterator[Collective]:
    """Yield the collectives of one computation, which runs `count` times."""
    types = {i.name: i.result for i in instructions}
    starts = {
        operand for i in instructions if _STARTS_CHAIN in i.attributes for operand in i.operands
    }
    for i in instructions:
        by_hosts = _BY_HOSTS.search(i.attributes) if i.operation == "send" else None
        kind = _HOSTS_KINDS[by_hosts[1]] if by_hosts else i.operation.removesuffix("-start")
        if kind not in KINDS or (_IN_CHAIN in i.attributes and i.name not in starts):
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
    """Return the text of the groups: lists, an iota, a mesh with axes, pairs, or hosts' targets."""
    if found := _HOSTS_TARGET.search(attributes):
        return found[1].strip('"')
    for key in ("replica_groups=", "source_target_pairs="):
        _, found, rest = attributes.partition(key)
        if found:
            return _AFTER_GROUPS.split(rest)[0]
    return ""


def device_groups(text: str, num_devices: int) -> list[list[int]]:
    """Return the groups of device numbers that `text` means, of which XLA writes four kinds.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: numbers counted in the shape on the right, transposed, in
    rows as on the left; `mesh['a'=2,'b'=4] {'b'}`: devices that differ along the axes named last;
    nothing: all devices. Pairs of a permutation are groups of two.
    """
    text = text.strip()
    if text in ("", "{}"):
        return [list(range(num_devices))]
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if iota := _IOTA.match(text):
        return _counted(iota[2], iota[3]).reshape(_numbers(iota[1])[0], -1).tolist()
    groups = re.findall(r"\{([\d,\s]+)\}", text)
    assert groups, f"replica groups of an unknown form: {text[:80]}"
    return [_numbers(group) for group in groups]


def slice_groups(text: str, positions: Mapping[int, int]) -> list[list[int]]:
    """Return the groups that `text` means: the devices of several slices that exchange arrays.

    `{1,2}x{0:3}`: each of devices 0 to 3 of slice 1 with its counterpart in slice 2;
    `{{100000,200000},{100001,200001}}`: ids of devices; `{{100000->200000}}`: pairs of such.
    `positions`: position in the mesh by device id.
    """
    if found := _SLICES.match(text):
        bounds = [part.split(":") for part in found[2].split(",")]
        members = [n for b in bounds for n in range(int(b[0]), int(b[-1]) + 1)]
        ids = [[s * _IDS_A_SLICE + n for s in _numbers(found[1])] for n in members]
    else:
        ids = [_numbers(g.replace("->", ",")) for g in re.findall(r"\{([\d,>\-]+)\}", text)]
        assert ids, f"exchange between slices of an unknown form: {text[:80]}"
    return [[positions[n] for n in group] for group in ids]


def axes_of_groups(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which devices of one group differ; `sizes` in the mesh's order."""
    used = set()
    for group in groups:
        coordinates = np.unravel_index(np.array(group), tuple(sizes.values()))
        used |= {a for a, c in zip(sizes, coordinates, strict=True) if len(set(c.tolist())) > 1}
    return tuple(axis for axis in sizes if axis in used)


def ring_bytes(collective: Collective, groups: list[list[int]], num_devices: int) -> float:
    """Return the bytes that a device sends in one call, in the algorithms that move least (rings).

    For n devices and an operand of b bytes: all-gather (n - 1) b; reduce-scatter and all-to-all
    (n - 1) / n b; all-reduce, which is one of each of the first two, 2 (n - 1) / n b. A permutation
    sends b from each device that is a source.
    """
    n, b = max(len(group) for group in groups), collective.operand_bytes
    match collective.kind:
        case "all-gather":
            return (n - 1) * b
        case "all-reduce":
            return 2 * (n - 1) / n * b
        case "collective-permute":
            return b * sum(source != target for source, target in groups) / num_devices
        case "collective-broadcast":
            return b
        case _:
            return (n - 1) / n * b


def slow_share(kind: str, groups: Sequence[Sequence[int]], nodes: Sequence[int]) -> float:
    """Return the part of what devices send in a collective that goes from one node to another.

    `nodes`: number of the node at each position of the mesh. Of a permutation it is the pairs that
    cross. All else are rings, each of which leaves a node once: of k devices that a group has in a
    node, each sends 1 / k to another one.
    """
    if kind == "collective-permute":
        moves = [(nodes[a], nodes[b]) for a, b in groups if a != b]
        return sum(a != b for a, b in moves) / max(1, len(moves))
    counts = [collections.Counter(nodes[n] for n in group) for group in groups]
    return max((1 / max(c.values()) for c in counts if len(c) > 1), default=0.0)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _counted(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _mesh_groups(text: str) -> list[list[int]]:
    sizes_text, ids, used_text = _MESH.match(text).groups()
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(sizes_text)}
    if ids is None:
        numbers = np.arange(math.prod(sizes.values()))
    elif found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids.removeprefix("<=")):
        numbers = _counted(found[1], found[2])
    else:
        numbers = np.array(_numbers(ids.strip("()")))
    # an axis may be used in part: 'a':(2)4 is the 4 in the middle of a = 2 x 4 x the rest
    shape, used = [], []
    parts = {name: (before, size) for name, before, size in _USED_AXIS.findall(used_text)}
    for name, size in sizes.items():
        before, part = parts.get(name, ("", ""))
        pieces = [size] if not part else [int(before), int(part), size // int(before) // int(part)]
        if name in parts:
            used.append(len(shape) + (1 if part else 0))
        shape += pieces
    array = numbers.reshape(shape)
    rest = [i for i in range(len(shape)) if i not in used]
    count = math.prod(shape[i] for i in used)
    return array.transpose([*rest, *used]).reshape(-1, count).tolist()
