"""Count the FLOPs of the matrix products that a compiled program runs, loops multiplied out.

Products appear as `dot`, alone or in a fusion, as `convolution` (libtpu's form of all of them) and
as calls of a library for products: cuBLAS in XLA for GPUs, oneDNN in XLA for CPUs. What a fused
attention kernel multiplies is in none of them.
"""

import math
import re

from llamajax.planning.hlo import Instruction, Program, array_shape

_LIBRARIES = re.compile(r'custom_call_target="__(?:cublas\$|onednn\$matmul)')
# as XLA writes them beside an instruction, and as libraries' configurations have them in JSON
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s(?:=\{|":\[)([^}\]]*)[}\]]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


def product_flops(program: Program) -> float:
    """Return the FLOPs of all matrix products in one run of one device's program."""
    return sum(count * flops_of(i) for i, count in program.executed())


def flops_of(i: Instruction) -> float:
    """Return the FLOPs of one instruction, without what it calls."""
    if i.operation == "convolution":
        return _convolution_flops(i)
    is_call = i.operation == "custom-call" and _LIBRARIES.search(i.attributes)
    if i.operation != "dot" and not is_call:
        return 0.0
    lhs = array_shape(i.operand_types[0])
    found = _CONTRACTED.search(i.attributes)
    if found:
        contracted = [int(n) for n in re.findall(r"\d+", found[1])]
    else:
        contracted = [len(lhs) - 1]  # oneDNN says so only where one is transposed
        if '"transpose_a":true' in i.attributes:
            contracted = [len(lhs) - 2]
    return 2.0 * math.prod(array_shape(i.result)) * math.prod(lhs[n] for n in contracted)


def _convolution_flops(i: Instruction) -> float:
    """Count multiplications of values alone: those with padding or with holes are none.

    libtpu writes batched products as convolutions with dilated windows, most of which is holes.
    """
    lhs, rhs = map(array_shape, i.operand_types[:2])
    out = array_shape(i.result)
    lhs_labels, rhs_labels, out_labels = _LABELS.search(i.attributes).groups()
    window = _WINDOW.search(i.attributes)
    keys = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    pairs = 1
    for n in range(len(out_labels) - 2):
        pairs *= _overlaps(
            lhs[lhs_labels.index(str(n))],
            rhs[rhs_labels.index(str(n))],
            out[out_labels.index(str(n))],
            {key: value.split("x")[n] for key, value in keys.items()},
        )
    batch, features = lhs[lhs_labels.index("b")], rhs[rhs_labels.index("i")]
    outputs = out[out_labels.index("f")]
    return 2.0 * batch * features * outputs * pairs / (int(groups[1]) if groups else 1)


def _overlaps(size: int, window: int, outputs: int, keys: dict[str, str]) -> int:
    """Count pairs of an output and a place in its window that meet a value of the input."""
    before = int(keys.get("pad", "0_0").split("_")[0])
    stride, hole, step = (int(keys.get(k, 1)) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    at = [o * stride + w * step - before for o in range(outputs) for w in range(window)]
    return sum(0 <= x < (size - 1) * hole + 1 and x % hole == 0 for x in at)
