"""Read from a compiled program which of its collectives run beside matrix products.

XLA for GPUs and libtpu write instructions in the order in which they are launched, and a collective
that runs beside others as a start and a done: what stands between the two runs beside it. One that
libtpu gives to the SparseCores is a call on their thread, which gets its operand in an update. For
others libtpu makes a chain of fusions, of which the first starts the collective and the last ends
it. A collective in a fusion of its own runs beside nothing.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping

from llamajax.planning.hlo import (
    KINDS,
    Collective,
    Instruction,
    called_by,
    collectives_of,
    executed,
    parse,
    trip_count,
)
from llamajax.planning.hlo_products import product_flops_of

# what a collective counts as, and the seconds of one call
Route = Callable[[Collective], tuple[Hashable, float]]
Waits = collections.Counter[Hashable]
_KERNELS = re.compile(r'custom_call_target="(?:__cudnn\$|tpu_custom_call)')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ENDS_CHAIN = 'custom_call_target="AsyncCollectiveDone"'
_IN_PLACE = '"is_sync":true'  # launched in the order of products, beside nothing


class _Clock:
    """Follow a program's launches on one device: products in one queue, collectives in another."""

    def __init__(self, text: str, route: Route, product_s: float, kernel_s: float):
        self._computations, self._entry = parse(text)
        self._route, self._product_s, self._kernel_s = route, product_s, kernel_s
        self._runs: dict[str, tuple[float, Waits]] = {}
        self._flops: dict[str, float] = {}

    def entry(self) -> tuple[float, Waits]:
        return self.run(self._entry)

    def flops(self, name: str) -> float:
        """FLOPs of a computation and of what it calls, once each."""
        if name not in self._flops:
            inside = self._computations[name]
            own = sum(product_flops_of(inside))
            self._flops[name] = own + sum(self.flops(n) for i in inside for n in called_by(i))
        return self._flops[name]

    def run(self, name: str) -> tuple[float, Waits]:
        """Seconds that a computation takes, and those it waits for each kind of collective."""
        if name not in self._runs:
            self._runs[name] = self._follow(name, self._computations[name])
        return self._runs[name]

    def _follow(self, name: str, instructions: list[Instruction]) -> tuple[float, Waits]:
        now, link_free, waits = 0.0, 0.0, Waits()
        ends: dict[str, tuple[Hashable, float]] = {}
        by_name = {i.name: i for i in instructions}
        for i, flops in zip(instructions, product_flops_of(instructions), strict=True):
            chain, ended = self._chain(i)
            if i.operation.endswith("-done"):
                ended = i.operands[0]
            if ended in ends:
                kind, end = ends[ended]
                waits[kind] += max(0.0, end - now)
                now = max(now, end)
            elif found := self._collective(name, i, by_name):
                kind, seconds = self._route(found)
                is_start = chain or i.operation.endswith(("-start", "-update"))
                if _IN_PLACE in i.attributes or not is_start:
                    waits[kind] += seconds
                    now += seconds
                else:
                    link_free = max(link_free, now) + seconds
                    ends[chain or i.name] = (kind, link_free)
            elif i.operation in ("while", "conditional", "call"):
                turns = 1
                if i.operation == "while":
                    turns = trip_count(i, self._computations, instructions)
                for called in called_by(i):
                    seconds, inner = self.run(called)
                    now += turns * seconds
                    for kind, waited in inner.items():
                        waits[kind] += turns * waited
            elif _KERNELS.search(i.attributes):
                now += self._kernel_s
            else:
                now += self._product_s * (flops + sum(map(self.flops, called_by(i))))
        return now, waits

    def _chain(self, i: Instruction) -> tuple[str, str]:
        """Return the chain that a fusion is part of, and the one that it ends; "" for none."""
        called = called_by(i) if i.operation == "fusion" else []
        inside = " ".join(j.attributes for name in called for j in self._computations[name])
        found = _CHAIN.search(inside)
        chain = found[1] if found else ""
        return chain, chain if _ENDS_CHAIN in inside else ""

    def _collective(
        self, name: str, i: Instruction, by_name: Mapping[str, Instruction]
    ) -> Collective | None:
        if i.operation.removesuffix("-start") in KINDS:
            # Their types alone: an operand may be a collective itself.
            operands = [dataclasses.replace(by_name[o], operation="parameter") for o in i.operands]
            return next(collectives_of(name, [*operands, i], 1), None)
        if i.operation in ("async-start", "call-update", "fusion"):
            start = by_name[i.operands[0]] if i.operation == "call-update" else i
            (called,) = called_by(start)
            return next(collectives_of(called, self._computations[called], 1), None)
        return None


def is_in_launch_order(text: str) -> bool:
    """Return whether the order of instructions tells what runs beside a collective."""
    return "is_scheduled=true" in text


def kernel_calls(text: str) -> int:
    """Return the number of calls of a fused attention kernel in a step."""
    return sum(
        count * sum(_KERNELS.search(i.attributes) is not None for i in instructions)
        for _, instructions, count in executed(text)
    )


def waited_s(text: str, route: Route, *, product_s: float, kernel_s: float) -> Waits:
    """Return the seconds a step of a scheduled program waits for each kind of collective.

    product_s: of one FLOP. kernel_s: of one call of a fused attention kernel.
    """
    return _Clock(text, route, product_s, kernel_s).entry()[1]
