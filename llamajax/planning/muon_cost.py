"""What Muon's Newton-Schulz iterations of sharded matrices cost: FLOPs and bytes, by formula."""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llamajax.config import RunConfig
from llamajax.config.schema import LORA_TARGETS
from llamajax.models.memory import layers_held, width
from llamajax.optim.muon import Exchange, exchanges, newton_schulz_flops


class _Matrix(NamedTuple):
    """A stack of matrices: sides, values of one, and the exchanges that make them whole."""

    sides: tuple[int, int]
    size: int
    steps: list[Exchange]


def muon_product_flops(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the FLOPs of Newton-Schulz products on one device, a step; 0 without Muon.

    Layers do not always divide by the devices that share them; those that fill up count.
    """
    layers = int(layers_held(config, sizes))
    return sum(
        (matrix.steps[-1].share if matrix.steps else layers) * newton_schulz_flops(*matrix.sides)
        for matrix in _matrices(config, sizes)
    )


def muon_sent_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes that a device sends in a step for Muon, by mesh axis, in the compute dtype.

    An axis of n devices that splits a matrix sends (n - 1) / n of a device's part in both
    directions. One along which devices hold the same gathers what they computed.
    """
    sent: collections.Counter[str] = collections.Counter()
    for matrix in _matrices(config, sizes):
        split = math.prod(sizes[step.axis] for step in matrix.steps if step.dim is not None)
        part = matrix.size / split  # of one layer, on one device
        for axis, dim, _, share in matrix.steps:
            n = sizes[axis]
            if dim is None:
                sent[axis] += width(config) * (n - 1) * share * part
            else:
                sent[axis] += 2 * width(config) * (n - 1) * share * part
                part *= n
    return dict(sent)


def _matrices(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[_Matrix]:
    if config.optim.name != "muon" or config.optim.chain is not None:
        return
    dims, layers = config.model.dims, int(layers_held(config, sizes))
    targets, rank = LORA_TARGETS, config.lora.rank
    both = [LORA_TARGETS[t] for t in (config.lora.targets if rank else targets)]
    if rank:
        dims = dims | {"R": rank}
        both = [pair for i, o in both for pair in ((i, "R"), ("R", o))]
    for inputs, outputs in both:
        sides = tuple(math.prod(dims[d] for d in side) for side in (inputs, outputs))
        steps = exchanges(inputs + outputs, layers, sizes)
        yield _Matrix(sides, math.prod(sides), steps)
