"""Which mesh axes a collective runs along, and what each device sends for it.

A program numbers its devices as the mesh lists them, the last axis fastest; the devices of one
group differ in their coordinates along the axes that are communicated over.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from llamajax.planning.program import Collective

_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"^mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{(.*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_USED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def device_groups(text: str, num_devices: int) -> list[list[int]]:
    """The groups of device numbers that `text` means, of which XLA writes four kinds.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: numbers counted in the shape on the right, transposed, in
    rows as on the left; `mesh['a'=2,'b'=4] {'b'}`: devices that differ along the axes named last;
    nothing: all devices. Pairs of a permutation are groups of two.
    """
    text = text.strip()
    if text in ("", "{}"):
        return [list(range(num_devices))]
    if text.startswith("mesh"):
        return _of_mesh(text)
    if iota := _IOTA.match(text):
        shape = _numbers(iota[1])
        return _counted(iota[2], iota[3]).reshape(shape[0], -1).tolist()
    groups = re.findall(r"\{([\d,\s]+)\}", text)
    assert groups, f"replica groups of an unknown form: {text[:80]}"
    return [_numbers(group) for group in groups]


def axes_of_groups(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which devices of one group differ; `sizes` in the mesh's order."""
    shape = tuple(sizes.values())
    used = set()
    for group in groups:
        coordinates = np.unravel_index(np.array(group), shape)
        used |= {a for a, c in zip(sizes, coordinates, strict=True) if len(set(c.tolist())) > 1}
    return tuple(axis for axis in sizes if axis in used)


def sent_bytes(collective: Collective, groups: list[list[int]], num_devices: int) -> float:
    """Bytes that a device sends in one call, in the algorithms that move least (rings).

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


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _counted(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _of_mesh(text: str) -> list[list[int]]:
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
