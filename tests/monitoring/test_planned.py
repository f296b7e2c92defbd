"""The report's table of what was planned beside what was measured."""

import json

from llamajax.monitoring.report.run_report import planned_and_measured, render_report

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
