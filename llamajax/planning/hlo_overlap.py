"""Read from a compiled program which of its collectives run beside matrix products.

XLA for GPUs and libtpu write instructions in the order in which they are launched, and a collective
that runs beside others as a start and a done: what stands between the two runs beside it. One that
libtpu gives to the SparseCores is a call on their thread, which gets its operand in an update. For
others libtpu makes a chain of fusions, of which the first starts the collective and the last ends
it. A collective in a fusion of its own runs beside nothing. Between slices of TPUs an array is sent
by the hosts until the receive of the same rendezvous is done; the links inside a slice work at the
same time.
"""

import collections
import functools
import re
from collections.abc import Callable, Hashable

from llamajax.planning.hlo import Collective, Instruction, Program
from llamajax.planning.hlo_products import flops_of

# what a collective counts as, and the seconds of one call
Route = Callable[[Collective], tuple[Hashable, float]]
Waits = collections.Counter[Hashable]
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ENDS_CHAIN = 'custom_call_target="AsyncCollectiveDone"'
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_IN_PLACE = '"is_sync":true'  # launched in the order of products, beside nothing


def waited_s(program: Program, route: Route, *, product_s: float, kernel_s: float) -> Waits:
    """Return the seconds a step waits for each kind of collective.

    It follows the launches on one device: products in one queue, collectives in another. product_s:
    of one FLOP. kernel_s: of one call of a fused attention kernel.
    """

    @functools.cache
    def flops(name: str) -> float:
        """FLOPs of a computation and of what it calls, once each."""
        inside = program.computations[name].values()
        return sum(flops_of(i) + sum(map(flops, i.called)) for i in inside)

    @functools.cache
    def run(name: str) -> tuple[float, Waits]:
        """Seconds that a computation takes, and those it waits for each kind of collective."""
        now, waits, instructions = 0.0, Waits(), program.computations[name]
        link_free = {False: 0.0, True: 0.0}  # of the links inside a slice, of the hosts' network
        ends: dict[str, tuple[Hashable, float]] = {}
        for i in instructions.values():
            chain, ended = _chain(program, i)
            if i.operation.endswith("-done") and i.operation != "send-done":  # on its host
                ended = _transfer(instructions[i.operands[0]])
            if ended in ends:
                kind, end = ends[ended]
                waits[kind] += max(0.0, end - now)
                now = max(now, end)
            elif found := program.started_by(i, name):
                kind, seconds = route(found)
                is_start = chain or i.operation.endswith(("-start", "-update", "send"))
                if _IN_PLACE in i.attributes or not is_start:
                    waits[kind] += seconds
                    now += seconds
                else:
                    end = max(link_free[found.between_slices], now) + seconds
                    link_free[found.between_slices] = end
                    ends[chain or _transfer(i)] = (kind, end)
            elif i.operation in ("while", "conditional", "call"):
                turns = program.turns(i, name)
                for called in i.called:
                    seconds, inner = run(called)
                    now += turns * seconds
                    waits.update({kind: turns * waited for kind, waited in inner.items()})
            elif i.is_attention_kernel:
                now += kernel_s
            else:
                now += product_s * (flops_of(i) + sum(map(flops, i.called)))
        return now, waits

    return run(program.entry)[1]


def _transfer(i: Instruction) -> str:
    """Return what the start and the end of a transfer have in common: a rendezvous, else a name."""
    found = _RENDEZVOUS.search(i.attributes)
    return found[1] if found else i.name


def _chain(program: Program, i: Instruction) -> tuple[str, str]:
    """Return the chain that a fusion is part of, and the one that it ends; "" for none."""
    inside = " ".join(j.attributes for j in program.inner(i)) if i.operation == "fusion" else ""
    found = _CHAIN.search(inside)
    chain = found[1] if found else ""
    return chain, chain if _ENDS_CHAIN in inside else ""
