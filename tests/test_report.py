"""The report needs nothing but the files of a run, and stands whatever is missing from them."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from refusal import refused

from llamajax.monitoring import MetricsWriter, read_run_facts, write_report, write_run_facts
from llamajax.monitoring.report.charts import nice_ticks, smooth, thin
from llamajax.monitoring.report.run_report import planned_and_measured, render_report
from llamajax.report import main

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects text, tags and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


def make_run(workdir: Path, *, steps: int, bad: int | None = None) -> None:
    workdir.mkdir()
    metrics = MetricsWriter(workdir, tensorboard=False, resume_step=0, primary=True)
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
    config = {"model": {"name": "tiny <b>&", "vocab_size": 512}, "train": {"steps": steps}}
    (workdir / "config.json").write_text(json.dumps(config))


def test_a_whole_run(tmp_path: Path):
    make_run(tmp_path / "run", steps=40, bad=7)
    write_run_facts(
        tmp_path / "run",
        {
            "status": "finished", "platform": "cpu", "num_devices": 8,
            "device_kind": "<script>alert(1)</script>", "num_parameters": 4_213_504,
            "unigram_entropy": 6.21, "mesh": {"data": 4, "fsdp": 2},
            "time_breakdown": {"wall_s": 200.0, "steps_s": 150.0, "compile_s": 30.0,
                               "other_s": 20.0, "goodput": 0.75},
        },
    )  # fmt: skip
    path = write_report(tmp_path / "run")
    page = Page(path.read_text(encoding="utf-8"))
    for expected in (
        "tiny <b>&", "4.21M parameters", "8 × <script>alert(1)</script>", "40", "2.645", "3.000",
        "perplexity 20.09", "6.210", "12.3k", "3m20s", "75.0 %", "vocab_size", "512",
        "1 row is not finite: step 7",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(page.all("svg")) == 4
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.seen)
    assert "url(" not in path.read_text()
    # The NaN breaks the line of the loss in two; held out is the third.
    loss = path.read_text().split("<svg")[1]
    assert loss.count("<polyline") == 3
    assert loss.count("<title>") == 4
    assert "nan" not in loss


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
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "in progress" in page.text
    assert "training loss" in page.text


def test_many_steps_stay_small(tmp_path: Path):
    make_run(tmp_path / "run", steps=5000)
    assert write_report(tmp_path / "run").stat().st_size < 100_000


def test_thinning_keeps_the_extremes():
    points = [(step, float(step % 7)) for step in range(5000)]
    points[1234] = (1234, 99.0)
    points[2345] = (2345, -99.0)
    kept = thin(points)
    assert len(kept) <= 510
    assert {(1234, 99.0), (2345, -99.0)} <= set(kept)
    assert kept == sorted(kept)


def test_ticks_and_means():
    assert nice_ticks(0.0, 10.0, count=5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(2.9, 8.1, count=5) == [3, 4, 5, 6, 7, 8]
    assert nice_ticks(1.0, 1.0, count=5) == [1.0]
    line = [(step, 2.0 * step) for step in range(300)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    assert smooth([(1, 1.0), (2, math.nan), (3, 5.0)]) == [(1, 1.0), (3, 5.0)]


def test_facts_are_merged(tmp_path: Path):
    write_run_facts(tmp_path, {"platform": "cpu", "status": "running"})
    write_run_facts(tmp_path, {"status": "finished"})
    assert read_run_facts(tmp_path) == {"platform": "cpu", "status": "finished"}


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "run", steps=3)
    assert main([f"--workdir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    with refused("is not a directory"):
        main([f"--workdir={tmp_path / 'none'}"])
    with refused("holds no run"):
        main([f"--workdir={tmp_path}"])
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()
    with refused("cannot be written"):
        main([f"--workdir={tmp_path / 'run'}"])
    assert list((tmp_path / "run").glob(".report*")) == []


def test_the_verb_needs_no_jax(tmp_path: Path):
    make_run(tmp_path / "run", steps=3)
    code = f"import sys, llamajax.report as r; r.main(['--workdir={tmp_path / 'run'}']); " \
        "sys.exit('jax' in sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# What was planned beside what was measured.
ROWS = [{"step": n, "step_time_s": t} for n, t in enumerate([9.0, 2.0, 2.2, 2.4, 2.2], start=1)]
FACTS = {"peak_memory_bytes": 5 * 2**30, "program_bytes": 2**32, "tokens_per_s": 1100.0}
PLAN = {"devices": "h200:8", "peak_bytes": 4 * 2**30, "step_time_s": 2.0, "tokens_per_s": 1000.0}


def row(*cells):
    return "<tr><td>" + '</td><td class="number">'.join(cells) + "</td></tr>"


def test_a_plan_is_beside_what_was_measured():
    page = planned_and_measured(PLAN, FACTS, ROWS)
    memory = row("memory of a device", "4.000 GiB", "5.000 GiB", "1.250")
    step = row("step", "2.000 s", "2.200 s", "1.100")
    assert memory + step + row("tokens/s", "1,000", "1,100", "1.100") in page
    assert "Planned for h200:8" in page


def test_without_a_plan_the_compiled_program_is_one():
    page = planned_and_measured({}, FACTS, ROWS)
    assert row("memory of a device", "4.000 GiB", "5.000 GiB", "1.250") in page
    assert page.count("<td>") == 1
    assert "Planned of the compiled program" in page


def test_nothing_planned_or_measured_shows_nothing_wrong():
    assert planned_and_measured({}, {}, ROWS) == ""
    unknown = row("memory of a device", "4.000 GiB", "unknown", "")
    assert unknown in planned_and_measured(PLAN, {}, [])


def test_the_report_reads_the_plan_of_its_directory_and_survives_a_damaged_one(tmp_path):
    for text, found in ((json.dumps(PLAN), True), ("{", False)):
        (tmp_path / "plan.json").write_text(text)
        assert ("Planned for h200:8" in render_report(tmp_path)) == found
