"""A sink gets the rows of metrics.jsonl, after a resume too; a slow or broken one stops nothing."""

import itertools
import sys
import threading
import types

import numpy as np
import pytest
from refusal import refused

from llamajax.monitoring import MetricsWriter, load_metrics
from llamajax.monitoring.sinks import (
    SinkThread,
    check_installed,
    close_sinks,
    open_sinks,
    tagged,
)


def test_tags_group_numbers():
    row = {
        "step": 3, "loss": np.float32(0.5), "tokens_per_s": 2.0, "mfu_full": None, "note": "x",
        "peak_memory_bytes": [3, 7], "update_skipped": "the loss is not finite",
        "norm_weight/attention": 1.0,
    }  # fmt: skip
    assert tagged(row) == {
        "train/loss": 0.5, "perf/tokens_per_s": 2.0, "perf/peak_memory_bytes": 7,
        "guard/update_skipped": 1, "norm_weight/attention": 1.0,
    }  # fmt: skip
    row = {"step": 3, "eval_loss": 0.5, "eval_loss/book": 2.0, "ema_loss/book": 3, "time_s": 1.0}
    assert tagged(row) == {
        "eval/loss": 0.5, "eval/loss/book": 2.0, "eval/ema_loss/book": 3, "eval/time_s": 1.0
    }  # fmt: skip


class Kept:
    """A sink that keeps what it gets; it waits for `gate`, and refuses step `fails`."""

    def __init__(self, fails=None, error=None):
        self.rows, self.gate, self._fails, self._error = [], threading.Event(), fails, error

    def write(self, values, step):
        self.gate.wait()
        if step == self._fails:
            raise self._error
        self.rows.append(step)

    def close(self):
        self.rows.append("closed")


def test_a_slow_sink_loses_rows_that_are_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("llamajax.monitoring.sinks._MOST_WAITING", 4)
    kept = Kept()
    thread = SinkThread("slow", lambda: kept)
    metrics = MetricsWriter(tmp_path, resume_step=0, primary=True, open_sinks=lambda _: [thread])
    for step in range(1, 21):
        metrics.write({"step": step})
    kept.gate.set()
    metrics.close()
    got = [step for step in kept.rows if step != "closed"]
    assert (got == list(range(1, len(got) + 1)), kept.rows[-1]) == (True, "closed")
    assert 4 <= len(got) == 20 - thread.dropped <= 5
    rows = load_metrics(tmp_path)
    assert rows[-1]["sink_dropped_rows"] == thread.dropped - 1
    assert "sink_dropped_rows" not in rows[3]
    assert capsys.readouterr().err.count("warning: monitoring.sinks: slow is slow: 4 rows") == 1


def test_sinks_that_hang_share_one_deadline(monkeypatch, capsys):
    """The first takes all of it, and the others were told to close before."""
    now, waited_s, kept = [0.0], [], Kept()

    def join(thread, within_s):
        waited_s.append(within_s)
        now[0] += within_s

    threads = [SinkThread(name, lambda: kept) for name in ("a", "b")]
    for thread in threads:
        thread.write({"step": 1})
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("threading.Thread.join", join)
    close_sinks(threads)
    assert waited_s == [10.0, 0.0]
    assert capsys.readouterr().err.count("did not take its last rows within 10 s") == 2
    kept.gate.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("the network is gone"), "the network is gone"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_sink_that_fails_is_warned_of_once(error, words, capsys):
    kept = Kept(fails=3, error=error)
    kept.gate.set()
    thread = SinkThread("broken", lambda: kept)
    for step in range(1, 10):
        thread.write({"step": step})
    close_sinks([thread])
    assert (kept.rows, thread.dropped) == ([1, 2, "closed"], 7)
    expected = f"warning: monitoring.sinks: broken is no longer written: {words}; training"
    assert capsys.readouterr().err.count(expected) == 1


def stand_in(runs):
    """A module like wandb that keeps runs by id in `runs`."""

    class Run:
        offline = True

        def __init__(self, **given):
            self.given, self.rows, self.finished = given, [], False
            runs.append(self)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values, step, commit):
            self.rows.append((step, values))

        def finish(self):
            self.finished = True

    return types.SimpleNamespace(init=Run, Settings=dict)


def test_wandb_goes_on_under_the_same_id(monkeypatch, tmp_path):
    """A resume sends the newest rows again; W&B's own step never falls."""
    runs, clock = [], itertools.count()
    monkeypatch.setattr("time.time", lambda: 1e9 + next(clock))
    monkeypatch.setitem(sys.modules, "wandb", stand_in(runs))
    for resume_step, last in ((0, 6), (4, 8)):
        metrics = MetricsWriter(
            tmp_path,
            resume_step=resume_step,
            primary=True,
            open_sinks=lambda step: open_sinks(
                ["wandb"], tmp_path, after_step=step, config={"a": 1}
            ),
        )
        for step in range(resume_step + 1, last + 1):
            metrics.write({"step": step, "loss": 1 / step, "time_s": 100.0 * (step > 2) + step})
        metrics.write_text("samples", "text", last)
        metrics.close()
    first, second = runs
    assert (first.finished, second.finished) == (True, True)
    assert first.given["id"] == second.given["id"]
    assert second.given["config"] == {"a": 1}
    assert [values["step"] for _, values in second.rows] == [3, 4, 5, 6, 7, 8, 8]
    assert second.rows[0][1] == {"step": 3, "train/loss": 1 / 3, "perf/time_s": 103.0}
    assert second.rows[-1][1] == {"step": 8, "samples": "text"}
    counted = [step for run in runs for step, _ in run.rows]
    assert counted == sorted(set(counted))


def test_a_sink_that_is_not_installed_refuses_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("monitoring.sinks: wandb needs a package", "pip install 'llamajax[wandb]'"):
        check_installed(["tensorboard", "wandb"])
