"""Errors, decisions and facts that several processes share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from llamajax.errors import TransientError, UserError
from llamajax.processes.host_collectives import (
    all_gather_host,
    broadcast_from_first,
    multihost_utils,
    raise_together,
    raising_together,
)
from llamajax.processes.process_facts import check_same


@pytest.fixture
def on_two(monkeypatch):
    """Calls a function of the rank on two processes, played by threads; what each returns."""
    me, sent, barrier = threading.local(), {}, threading.Barrier(2)

    def gather(mine):
        sent[me.rank] = mine
        barrier.wait()
        found = np.stack([sent[0], sent[1]])
        barrier.wait()
        return found

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: me.rank)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    def run(function):
        def as_process(rank):
            me.rank = rank
            try:
                return function(rank)
            except UserError as error:
                return type(error), str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_process, range(2)))

    return run


@pytest.mark.parametrize("kind", [UserError, TransientError])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_keeps_its_type_on_the_other_process(on_two, kind, rank):
    assert on_two(lambda _: raise_together(None)) == [None, None]
    text = "the bucket: no " * 100
    found = on_two(lambda me: raise_together(kind(text) if me == rank else None))
    assert found == [(kind, text)] * 2

    def block(me):
        with raising_together():
            if me == rank:
                raise kind(text)

    assert on_two(block) == [(kind, text)] * 2


@pytest.mark.parametrize("value", [None, 0, 3, True, "newest", ["donation"], "x" * 3000])
def test_process_0_decides_for_all(on_two, value):
    called = []

    def decide(*args):
        called.append(args)
        return value

    assert on_two(lambda _: broadcast_from_first(decide, 1, 2)) == [value] * 2
    assert called == [(1, 2)]


def test_an_error_of_process_0_is_raised_on_all(on_two):
    def refuse():
        raise UserError("no")

    assert on_two(lambda _: broadcast_from_first(refuse)) == [(UserError, "no")] * 2


def test_numbers_of_more_than_32_bits(on_two):
    assert on_two(lambda rank: all_gather_host(2**40 + rank)) == [[2**40, 2**40 + 1]] * 2


def test_processes_that_differ_are_told_in_what(on_two):
    assert on_two(lambda _: check_same({"a": 1})) == [None, None]
    first, second = on_two(lambda rank: check_same({"a": 1, "b": rank}))
    assert first == second
    assert "differ in b: 0 in process 0 on " in first[1]
