"""Sum up what a compiled program sends: bytes by kind of collective, mesh axes and dtype.

A program numbers its devices as the mesh lists them, the last axis fastest; the devices of one
group differ in their coordinates along the axes that are communicated over.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from llamajax.planning.hlo import Collective, Program

_IDS_A_SLICE = 100_000  # libtpu numbers device 3 of the first of several slices 100003
_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"^mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{(.*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_USED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_SLICES = re.compile(r"^\{([\d,]+)\}x\{([\d,:]+)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes: calls a step, and bytes that a device sends.

    slow_bytes: the part of them that goes from one node, or slice of TPUs, to another. waits_s: the
    seconds a step waits for them, predicted from the order of the program; None where that says
    nothing.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    calls: int
    sent_bytes: float
    slow_bytes: float
    waits_s: float | None = None


def traffic(
    program: Program,
    mesh: Mesh,
    nodes: Sequence[int],
    waits: Mapping[Hashable, float] | None = None,
) -> tuple[Traffic, ...]:
    """Return what a compiled program sends in one run, by kind, axes and dtype; most first.

    nodes: number of the node of each device of the mesh, in its order. waits: seconds by (kind,
    axes, dtype).
    """
    rows: dict[Hashable, Traffic] = {}
    for collective in program.collectives():
        axes, sent, slow = route(collective, mesh, nodes)
        if not axes:
            continue
        key, n = (collective.kind, axes, collective.dtype), collective.count
        waits_s = None if waits is None else waits.get(key, 0.0)
        row = rows.get(key) or Traffic(*key, 0, 0.0, 0.0, waits_s)
        rows[key] = dataclasses.replace(
            row,
            calls=row.calls + n,
            sent_bytes=row.sent_bytes + n * sent,
            slow_bytes=row.slow_bytes + n * slow,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.sent_bytes))


def route(
    collective: Collective, mesh: Mesh, nodes: Sequence[int]
) -> tuple[tuple[str, ...], float, float]:
    """Return the mesh axes of one call, the bytes that a device sends, and those to other nodes."""
    groups = groups_of(collective, mesh)
    axes, sent = axes_of_groups(groups, mesh.shape), ring_bytes(collective, groups, mesh.size)
    return axes, sent, sent * slow_share(collective.kind, groups, nodes)


def groups_of(collective: Collective, mesh: Mesh) -> list[list[int]]:
    """Return the groups of positions in the mesh that exchange arrays in a collective."""
    if not collective.between_slices:
        return device_groups(collective.groups, mesh.size)
    positions = {device.id: n for n, device in enumerate(mesh.devices.flat)}
    return slice_groups(collective.groups, positions)


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
