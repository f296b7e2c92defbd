"""Events outlive killed writers, and seconds add up over all processes of a run."""

import fcntl
import json
from pathlib import Path

from refusal import refused

from llamajax.monitoring import EventLog, load_events
from llamajax.monitoring.events import EVENTS, LOCK, is_running
from llamajax.monitoring.run_history import SUMMARY, History


def begun(workdir, *, primary=True):
    log = EventLog(workdir, primary=primary)
    log.begin()
    return log


def test_events_are_appended_with_their_time(tmp_path):
    log = begun(tmp_path)
    log.write("compile", step=0, duration_s=2.5)
    begun(tmp_path).write("signal", step=3)
    begun(tmp_path, primary=False).write("end", step=3)
    first, second = load_events(tmp_path)
    times = first.pop("time_s"), second.pop("time_s"), log.time_s
    assert first == {"event": "compile", "step": 0, "duration_s": 2.5}
    assert second == {"event": "signal", "step": 3}
    assert times == tuple(sorted(times))


def test_a_clock_that_jumps_does_not_move_events(tmp_path, monkeypatch):
    log = begun(tmp_path)
    before = log.time_s
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert log.time_s >= before


def test_events_wait_until_the_log_begins(tmp_path):
    log = EventLog(tmp_path, primary=True)
    log.write("start", step=0)
    assert list(tmp_path.iterdir()) == []
    log.begin()
    assert [event["event"] for event in load_events(tmp_path)] == ["start"]


def test_a_directory_that_has_gone_is_one_error(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    log = begun(workdir)
    log.write("start", step=0)
    (workdir / EVENTS).unlink()
    workdir.rmdir()
    with refused("has gone while the run was using it"):
        log.write("save", step=4)
    log.write("end", step=4)
    assert not workdir.exists()


def test_a_run_is_running_while_its_lock_is_held(tmp_path):
    assert not is_running(tmp_path)
    with (tmp_path / LOCK.format(process_id=0)).open("w") as file:
        assert not is_running(tmp_path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_running(tmp_path)
    assert not is_running(tmp_path)


def event(kind: str, time_s: float, step: int = 0, **fields):
    return {"event": kind, "time_s": time_s, "step": step} | fields


def row(step: int, time_s: float, step_time_s: float = 2.0, data_wait_s: float = 0.5):
    return {"step": step, "time_s": time_s, "step_time_s": step_time_s, "tokens_per_s": 50.0,
            "data_wait_s": data_wait_s}  # fmt: skip


KILLED = [
    event("start", 110.0, duration_s=10.0),
    event("restore", 111.0, duration_s=1.0, source="init"),
    event("compile", 121.0, duration_s=10.0, removed_steps_s=0.0, removed_data_wait_s=0.0),
    event("save", 127.0, step=2, duration_s=1.0),
]
# Step 3 is logged (2.5 s each) and lost by the kill; the next start restores step 2.
KILLED_ROWS = [row(2, 126.0), row(3, 129.5)]


def summary(events, rows, *, running=False):
    return History(Path(), events, rows).summary(running=running)


def test_a_killed_run_is_dead_once_its_lock_is_free():
    assert summary(KILLED, KILLED_ROWS, running=True)["status"] == "running"
    facts = summary(KILLED, KILLED_ROWS, running=False)
    assert (facts["status"], facts["starts"], facts["tokens_per_s"]) == ("dead", 1, 50.0)
    assert tuple(facts) == SUMMARY
    assert facts["time_breakdown"] == {
        "wall_s": 29.5, "steps_s": 6.0, "data_wait_s": 1.5, "start_s": 10.0, "redone_s": 0.0,
        "init_s": 1.0, "compile_s": 10.0, "checkpoint_s": 1.0, "other_s": 0.0,
        "goodput": 6.0 / 29.5,
    }  # fmt: skip


def test_seconds_of_all_processes_add_up():
    removed = History(Path(), KILLED, KILLED_ROWS).time_after(2)
    kept = {"kept_steps_s": 0.0, "kept_data_wait_s": 0.0, "kept_tokens": 0.0}
    assert removed == kept | {"removed_steps_s": 2.0, "removed_data_wait_s": 0.5}
    again = [
        event("found_dead", 209.0, step=3, last_seen_s=129.5),
        event("start", 210.0, step=2, duration_s=10.0),
        event("restore", 213.0, step=2, duration_s=3.0, source="restore"),
        event("compile", 218.0, step=2, duration_s=5.0, **removed),
    ]
    # Step 4 is not finite: back to step 2, whose data is left out.
    rolled_back = [
        event("skipped_update", 223.0, step=4, reason="the loss is not finite"),
        event("rollback", 223.0, step=4, to_step=2),
        event("restore", 224.0, step=2, duration_s=1.0, source="restore", removed_steps_s=4.0,
              removed_data_wait_s=1.0),
        event("evaluation", 230.0, step=4, duration_s=1.0),
        event("end", 230.5, step=4, status="finished", code=0),
    ]  # fmt: skip
    rows = [row(2, 126.0), row(3, 226.5), row(4, 229.0)]
    facts = summary(KILLED + again + rolled_back, rows, running=False)
    assert (facts["status"], facts["starts"], facts["rollbacks"]) == ("finished", 2, 1)
    breakdown = facts["time_breakdown"]
    assert breakdown == {
        "wall_s": 130.5, "steps_s": 8.0, "data_wait_s": 3.5, "redone_s": 2.0, "rolled_back_s": 4.0,
        "start_s": 20.0, "init_s": 1.0, "restore_s": 4.0, "compile_s": 15.0, "checkpoint_s": 1.0,
        "evaluation_s": 1.0, "down_s": 70.5, "other_s": 0.5, "goodput": 8.0 / 130.5,
    }  # fmt: skip
    parts = [s for key, s in breakdown.items() if key.endswith("_s") and key != "wall_s"]
    assert sum(parts) == breakdown["wall_s"]


def test_a_row_counts_its_steps_since_the_last_row_or_start():
    events = [
        event("start", 0.0),
        event("restore", 0.0, step=0, source="init", duration_s=0.0),
        event("restore", 50.0, step=22, source="restore", duration_s=0.0),
    ]
    rows = [row(20, 40.0), row(25, 60.0)]
    assert summary(events, rows, running=True)["time_breakdown"]["steps_s"] == 46.0
    # Back before the earlier start: its step is no border any more.
    events.append(event("restore", 70.0, step=10, source="restore", duration_s=0.0))
    rows = [row(10, 20.0), row(20, 90.0), row(25, 100.0)]
    assert summary(events, rows, running=True)["time_breakdown"]["steps_s"] == 50.0


def test_steps_of_a_removed_row_that_are_not_done_again_still_count():
    events = [event("restore", 0.0, step=0, source="init", duration_s=0.0)]
    rows = [row(20, 40.0), row(30, 60.0)]
    removed = History(Path(), events, rows).time_after(25)
    assert (removed["kept_steps_s"], removed["removed_steps_s"]) == (10.0, 10.0)
    events.append(event("restore", 70.0, step=25, source="restore", duration_s=0.0, **removed))
    rows = [row(20, 40.0), row(30, 90.0)]
    breakdown = summary(events, rows, running=True)["time_breakdown"]
    assert (breakdown["steps_s"], breakdown["redone_s"]) == (60.0, 10.0)


def test_a_run_of_an_earlier_release_has_no_record(tmp_path):
    assert summary([], [row(3, 1.0)], running=False) == {}
    (tmp_path / EVENTS).write_text(json.dumps({"event": "save", "step": 1}) + "\n")
    assert load_events(tmp_path) == []
