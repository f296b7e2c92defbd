"""The report needs nothing but the files of a run, and stands whatever is missing from them.

What its script draws is looked at by `tests/monitoring/browse_page.py`.
"""

import contextlib
import fcntl
import http.client
import json
import math
import os
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from refusal import refused
from workdirs import write_rows

from llamajax.monitoring import MetricsWriter, write_report, write_run_facts
from llamajax.monitoring.events import LOCK
from llamajax.monitoring.report import refresh, run_report
from llamajax.monitoring.report.curves import CELLS, curves
from llamajax.monitoring.report.run_data import read_run
from llamajax.monitoring.report.server import ReportServer
from llamajax.report import main

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects text and tags; `data` is what it holds."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = self.json = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.data = json.loads(self.json)
        self.run = self.data["runs"][0]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and self.seen[-1][1].get("id") == "data":
            self.json += data
        elif self.open and self.open[-1] not in ("style", "script"):
            self.text += data


HOSTILE = "</script><script>alert(1)</script> {data} <!-- & \ud800"


def make_run(workdir: Path, *, steps: int, bad: int | None = None) -> None:
    workdir.mkdir()
    metrics = MetricsWriter(workdir, resume_step=0, primary=True)
    for step in range(1, steps + 1):
        loss = math.nan if step == bad else 8 / step**0.3
        metrics.write(
            {
                "step": step, "loss": loss, "grad_norm": 1 / step, "learning_rate": 1e-3 / step,
                "tokens_per_s": 12345.0, "tokens_seen": step * 4096, "mfu_full": None,
            }
        )  # fmt: skip
        if step % 10 == 0:
            metrics.write({"step": step, "eval_loss": 3.0, "eval_perplexity": 20.0})
    metrics.close()
    model = {"name": "tiny", "vocab_size": 512}
    data = {"path": f"{workdir.parent}/books,{workdir.parent}/web"}
    config = {"model": model, "data": data, "train": {"steps": steps, "name": HOSTILE}}
    (workdir / "config.json").write_text(json.dumps(config))


def test_a_whole_run(tmp_path: Path):
    run = tmp_path / "run"
    make_run(run, steps=40, bad=7)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "inspect.html").touch()
    text = "call me </script> \u2028 <!-- <script>"
    write_rows(run / "samples.jsonl", {"step": 10, "prompt": "Call", "text": text}, {"step": "no"})
    breakdown = {"wall_s": 200.0, "steps_s": 150.0, "compile_s": 50.0, "goodput": 0.75}
    facts = {"status": "finished", "mesh": {"data": 4}, "time_breakdown": breakdown}
    write_run_facts(run, facts)
    page = Page(write_report(run))
    assert HOSTILE.replace("\ud800", "?") in page.text
    assert page.run["samples"] == [{"step": 10, "prompt": "Call", "text": text}]
    assert page.run["data"] == [
        {"path": f"{tmp_path}/books", "page": None},
        {"path": f"{tmp_path}/web", "page": "../web/inspect.html"},
    ]
    shown = page.run["curves"]["train"]
    assert shown["step"] == list(range(1, 41))
    assert shown["loss"][6] is None
    assert shown["loss"][:6] == pytest.approx([8 / step**0.3 for step in range(1, 7)], rel=1e-6)
    assert shown["tokens_seen"][-1] == 40 * 4096
    assert "mfu_full" not in shown  # null in every row: the peak is unknown
    assert page.run["curves"]["evaluations"]["eval_loss"]["eval_loss"] == [3.0] * 4
    assert page.run["curves"]["nonfinite"] == [[7, "loss"]]
    assert page.run["facts"]["time_breakdown"] == breakdown
    # What has a finite end only beside something else is no success.
    verdict = page.run["verdict"]
    assert (verdict["level"], verdict["incidents"]) == ("warn", ["1 row that is not finite"])
    # Nothing comes from elsewhere, and the one script is the one that is allowed.
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.seen)
    assert [attributes for tag, attributes in page.seen if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip


def test_validation_sets_and_other_numbers_have_their_own_curves():
    rows = [{"step": n, "loss": 2.0, "norm/embed": float(n), "tokens_seen": n} for n in (1, 2)]
    rows.append({"step": 2, "eval_loss/book": 1.5, "ema_loss/book": 1.25, "time_s": 7.0})
    rows[-1] |= {"eval_loss/code": 2.5, "eval_bits_per_byte/code": 3.5}
    # No row is of steps 3 and 9, and none comes after 9.
    rows.append({"step": 6, "loss": 2.0, "tokens_seen": 10})
    rows += [{"step": n, "eval_loss": 3.0, "ema_loss": 2.75} for n in (3, 9)]
    rows[-2] |= {"task/order/accuracy": 0.25}
    found = curves(rows, first_s=5.0)
    assert found["train"]["norm/embed"] == [1.0, 2.0, None]
    evaluations = found["evaluations"]
    assert {key: table[key] for key, table in evaluations.items()} == {
        "eval_loss/book": [1.5], "ema_loss/book": [1.25], "eval_loss/code": [2.5],
        "eval_bits_per_byte/code": [3.5], "eval_loss": [3.0, 3.0], "ema_loss": [2.75, 2.75],
        "task/order/accuracy": [0.25],
    }  # fmt: skip
    assert evaluations["eval_loss"]["tokens_seen"] == [4, None]
    code, task = evaluations["eval_loss/code"], evaluations["task/order/accuracy"]
    assert (code["tokens_seen"], code["time_s"]) == ([2], [2.0])
    assert (task["step"], task["tokens_seen"]) == ([3], [4])


@pytest.mark.parametrize("config", [None, "{", "[1]", '{"model": 3, "train": {"steps": null}}'])
@pytest.mark.parametrize("facts", [None, "", '{"time_breakdown": null, "mesh": [3]}'])
@pytest.mark.parametrize(
    "metrics",
    ["", '{"step": 1, "loss": null}\n', '{"step": 1, "loss": 3.5, "tokens_per_s": 0.0}\n{"st'],
)
def test_a_run_in_progress(tmp_path: Path, config: str | None, facts: str | None, metrics: str):
    (tmp_path / "metrics.jsonl").write_text(metrics)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if facts is not None:
        (tmp_path / "run.json").write_text(facts)
    (tmp_path / "events.jsonl").write_text('{"step": 1}\nx\n')
    page = Page(write_report(tmp_path))
    assert "in progress" in page.text
    assert page.run["verdict"]["level"] == "info"


def test_many_steps_stay_small_and_keep_their_extremes(tmp_path: Path):
    rows = [
        {"step": n, "loss": n % 7 / 3 + 1e-7, "grad_norm": 1 / n, "tokens_per_s": 1.0 * (n % 99),
         "learning_rate": n / 3, "data_wait_s": n / 7e5, "step_time_s": n / 9, "time_s": n / 3,
         "tokens_seen": n * 4096, "mfu_full": n / 9e6, "mfu_causal": n / 9e7}
        for n in range(1, 30001)
    ]  # fmt: skip
    rows[12345]["loss"], rows[20000]["loss"], rows[20005]["loss"] = 99.0, -99.0, math.nan
    rows[777]["update_skipped"] = "a spike"
    found = curves(rows, first_s=0.0)
    train = found["train"]
    assert len(json.dumps(found)) < 1_500_000
    assert sum(map(len, train.values())) <= CELLS
    assert train["step"] == sorted(set(train["step"]))
    assert {1, 778, 12346, 20001, 20006, 30000} <= set(train["step"])
    at = {step: loss for step, loss in zip(train["step"], train["loss"], strict=True)}
    assert (at[12346], at[20001], at[20006]) == (99.0, -99.0, None)
    assert found["means"]["grad_norm"][1] == pytest.approx(sum(1 / n for n in range(31, 61)) / 30)
    assert curves(rows[:99], first_s=0.0)["means"] is None


def test_a_report_keeps_the_facts_that_a_start_writes_meanwhile(tmp_path: Path, monkeypatch):
    make_run(tmp_path / "run", steps=3)
    end = {"event": "end", "step": 3, "time_s": 5.0, "status": "finished"}
    write_rows(tmp_path / "run" / "events.jsonl", end)
    write_run_facts(tmp_path / "run", {"platform": "cpu", "status": "dead", "program": "a"})

    def read(*args):
        found = read_runs(*args)
        write_run_facts(tmp_path / "run", {"platform": "gpu", "origin": {"step": 7}})
        return found

    read_runs = run_report.read_runs
    monkeypatch.setattr(run_report, "read_runs", read)
    write_report(tmp_path / "run", price_per_hour=2.5)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["platform"], facts["origin"], facts["status"]) == ("gpu", {"step": 7}, "finished")
    assert (facts["program"], facts["price_per_hour"]) == ("a", 2.5)


START = {"event": "start", "step": 0, "time_s": 1.0}


@pytest.mark.parametrize(
    ("event", "row"),
    [
        ({"event": "end"}, {}),
        ({"event": "save", "time_s": None}, {}),
        ({"event": "save", "duration_s": "long"}, {}),
        ({"event": "found_dead"}, {}),
        ({}, {"step_time_s": 1.0, "time_s": 2.0}),
        ({}, {"time_s": None}),
        ({}, {"memory_bytes": [None, 1]}),
        ({}, {"grad_norm": 10**400}),
    ],
)
def test_a_record_of_another_shape_is_one_error(tmp_path: Path, event: dict, row: dict):
    events = [START, START | event] if event else [START]
    write_rows(tmp_path / "events.jsonl", *events)
    write_rows(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0} | row)
    with refused(f"--workdir={tmp_path}", "cannot be read", unchanged=(tmp_path,)) as lines:
        main([f"--workdir={tmp_path}", f"--output={tmp_path.parent / 'page.html'}"])
    assert len(lines) == 1


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    make_run(run, steps=3)
    assert main([f"--workdir={run}", "--price_per_hour=2.5"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    # Later reports, those of the run itself as well, know the price.
    assert Page(write_report(run)).data["price_per_hour"] == 2.5
    make_run(tmp_path / "a,b", steps=5)
    assert main([f"--workdir={tmp_path / 'a,b'}", f"--output={tmp_path / 'a.html'}"]) == 0
    (tmp_path / "a,b").rename(tmp_path / "other")
    assert main([f"--workdir={run},{tmp_path / 'other'}", f"--output={tmp_path / 'a.html'}"]) == 0
    assert [each["step"] for each in Page(tmp_path / "a.html").data["runs"]] == [3, 5]
    assert not (tmp_path / "other" / "run.json").exists()
    with refused("is not a directory"):
        main([f"--workdir={tmp_path / 'none'}"])
    with refused("holds no run"):
        main([f"--workdir={tmp_path}"])
    with refused("names no directory"):
        main(["--workdir=,"])
    with refused("leave out --output"):
        main([f"--workdir={run}", "--serve", f"--output={tmp_path / 'b.html'}"])
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with refused("cannot be written"):
        main([f"--workdir={run}"])
    assert list(run.glob(".report*")) == []


def test_a_served_page_follows_the_run(tmp_path: Path):
    run = tmp_path / "run"
    make_run(run, steps=3)
    write_rows(run / "blackbox" / "2_skip.jsonl", {"step": 2, "reason": "skip"})
    with ReportServer([run], port=0, price_per_hour=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(path: str, **headers: str) -> tuple[int, str]:
            client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            client.request("GET", path, headers=headers)
            answer = client.getresponse()
            return answer.status, answer.read().decode()

        version = get("/version")[1]
        page = tmp_path / "page.html"
        page.write_text(get("/")[1])
        assert Page(page).data["version"] == version
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "loss": 1.0}\n')
        assert get("/version")[1] != version
        page.write_text(get("/")[1])
        assert Page(page).run["step"] == 4
        assert get("/blackbox/2_skip.jsonl")[0] == 200
        assert get("/config.json")[0] == 404
        (tmp_path / "web").mkdir()
        (tmp_path / "web" / "inspect.html").write_text("web's own")
        (tmp_path / "web" / "other.html").touch()
        assert get("/web/inspect.html") == (200, "web's own")  # of the link ../web/inspect.html
        assert get("/web/other.html")[0] == get("/books/inspect.html")[0] == 404
        hosts = ("localhost", "localhost:80", "127.0.0.1", "[::1]:80", "[::1]")
        assert {get("/version", Host=host)[0] for host in hosts} == {200}
        for host in ("elsewhere.example:80", "localhost.example", "localhost:80.example", ""):
            assert get("/", Host=host)[0] == 403
        # A killed process changes no file; its lock says so.
        with (run / LOCK.format(process_id=0)).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            version = get("/version")[1]
        assert get("/version")[1] != version
        write_rows(run / "events.jsonl", {"event": "end", "step": 4, "time_s": 5.0})
        status, text = get("/")
        assert (status, str(run) in text) == (500, True)
        (run / "events.jsonl").unlink()
        assert get("/")[0] == 200
        with refused("in use", "give another port"):
            main([f"--workdir={run}", "--serve", str(server.server_port)])
        server.shutdown()
    assert not (run / "report.html").exists()


def test_a_report_is_written_at_the_end_of_what_was_accepted(tmp_path: Path, capsys, monkeypatch):
    run = tmp_path / "run"
    make_run(run, steps=3)
    with refreshed(run):
        pass  # refused: no event was written
    assert not (run / "report.html").exists()
    with contextlib.suppress(ZeroDivisionError), refreshed(run):
        write_rows(run / "events.jsonl", {"event": "start", "step": 0, "time_s": 5.0})
        raise ZeroDivisionError
    assert Page(run / "report.html").run["verdict"]["status"] == "dead"
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with refreshed(run):
        write_rows(run / "events.jsonl", {"event": "end", "step": 3, "time_s": 5.0})
    assert "warning: no report was written" in capsys.readouterr().err


def test_a_report_is_rewritten_meanwhile(tmp_path: Path, capsys, monkeypatch):
    run, written = tmp_path / "run", threading.Event()
    make_run(run, steps=3)
    monkeypatch.setattr(refresh, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(refresh, "_IDLE_SHARE", 0)

    def write(*args):
        try:
            return written_by(*args)
        finally:
            written.set()

    written_by = refresh._write
    monkeypatch.setattr(refresh, "_write", write)
    start, groups = subprocess.Popen, []

    def started(*args, **options):
        child = start(*args, **options)
        groups.append(os.getpgid(child.pid))
        return child

    monkeypatch.setattr(subprocess, "Popen", started)
    with refreshed(run):
        write_rows(run / "events.jsonl", {"event": "start", "step": 0, "time_s": 5.0})
        assert written.wait(60)
        assert Page(run / "report.html").run["step"] == 3
        (run / "report.html").unlink()
        (run / "report.html").mkdir()  # fails from now on
        for time_s in (6.0, 7.0):
            written.clear()
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": "save", "step": 3, "time_s": time_s}) + "\n")
            assert written.wait(60)
    assert capsys.readouterr().err.count("report.html is not up to date") == 1
    assert os.getpgrp() not in groups  # which Ctrl-C ends


def refreshed(run: Path):
    return refresh.refreshed_report(run, primary=True)


def test_the_verb_needs_no_jax(tmp_path: Path):
    make_run(tmp_path / "run", steps=3)
    code = f"import sys, llamajax.report as r; r.main(['--workdir={tmp_path / 'run'}']); " \
        "sys.exit('jax' in sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


PLAN = {"devices": "h200:8", "peak_bytes": 4 * 2**30, "step_time_s": 2.0, "tokens_per_s": 1000.0}


def test_a_plan_is_beside_what_was_measured(tmp_path: Path):
    times = enumerate([9.0, 2.0, 2.2, 2.4, 2.2], start=1)
    rows = [{"step": n, "loss": 1.0, "step_time_s": t} for n, t in times]
    write_rows(tmp_path / "metrics.jsonl", *rows)
    write_run_facts(tmp_path, {"peak_memory_bytes": 5 * 2**30, "tokens_per_s": 1100.0})
    for text, found in ((json.dumps(PLAN), PLAN), ("{", {})):
        (tmp_path / "plan.json").write_text(text)
        run = read_run(tmp_path, cells=CELLS)
        assert run["plan"] == found
        # without the first quarter, in which caches warm up
        assert run["measured"] == {
            "peak_memory_bytes": 5 * 2**30, "tokens_per_s": 1100.0, "step_time_s": 2.2
        }  # fmt: skip
