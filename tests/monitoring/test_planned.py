"""The report's comparison of what was planned with what was measured."""

import json

from llamajax.monitoring.report.run_report import compared, planned_section

ROWS = [{"step": n, "step_time_s": t} for n, t in enumerate([9.0, 2.0, 2.2, 2.4, 2.2], start=1)]
FACTS = {"peak_memory_bytes": 5 * 2**30, "program_bytes": 2**32, "tokens_per_s": 1100.0}
PLAN = {"devices": "h200:8", "peak_bytes": 4 * 2**30, "step_time_s": 2.0, "tokens_per_s": 1000.0}


def test_a_plan_stands_beside_what_was_measured(tmp_path):
    assert compared(PLAN, FACTS, ROWS) == [
        ("memory of a device", "4.000 GiB", "5.000 GiB", "1.250"),
        ("step", "2.000 s", "2.200 s", "1.100"),
        ("tokens/s", "1,000", "1,100", "1.100"),
    ]
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    assert "Planned for h200:8" in planned_section(tmp_path, FACTS, ROWS)


def test_without_a_plan_the_compiled_program_is_one(tmp_path):
    assert compared({}, FACTS, ROWS) == [("memory of a device", "4.000 GiB", "5.000 GiB", "1.250")]
    assert "Planned of the compiled program" in planned_section(tmp_path, FACTS, ROWS)


def test_nothing_planned_or_measured_shows_nothing_wrong(tmp_path):
    assert planned_section(tmp_path, {}, ROWS) == ""
    assert compared(PLAN, {}, [])[0] == ("memory of a device", "4.000 GiB", "unknown", "")
    (tmp_path / "plan.json").write_text("{")
    assert planned_section(tmp_path, {}, ROWS) == ""
