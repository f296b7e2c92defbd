"""The time of a run: what a slow loader costs is named, in every row and in the report."""

import collections
import json
import threading

import pytest

from llamajax.monitoring import StepTimer
from llamajax.training import loop, run


class LoaderTimer(StepTimer):
    """Time passes in the loader only: half a second a batch, after the running step is done."""

    now = 100.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs, clock=lambda: LoaderTimer.now)

    def mark_done(self, step: int) -> None:
        super().mark_done(step)
        DONE[step].set()


DONE: dict[int, threading.Event] = collections.defaultdict(threading.Event)


def test_a_slow_loader_is_waiting_for_data(short_run, tmp_path, monkeypatch):
    batches = loop.train_batches

    def slow(*args, step):
        for number, batch in enumerate(batches(*args, step=step)):
            assert number == 0 or DONE[number].wait(60)
            LoaderTimer.now += 0.5
            yield batch

    monkeypatch.setattr(run, "StepTimer", LoaderTimer)
    monkeypatch.setattr(loop, "train_batches", slow)
    assert short_run(tmp_path, train__steps=4) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times = [(row["data_wait_s"], row["step_time_s"]) for row in rows if "loss" in row]
    assert times == [(0.5, 0.0)] * 4
    breakdown = json.loads((tmp_path / "run.json").read_text())["time_breakdown"]
    assert breakdown["data_wait_s"] == pytest.approx(2.0)
    assert "waiting for data" in (tmp_path / "report.html").read_text()
