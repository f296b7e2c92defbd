"""A profile's summary, of intervals by hand."""

import contextlib
import types

import pytest

from llamajax.planning.profile_hook import ProfileHook
from llamajax.planning.profile_summary import lines, measure
from llamajax.planning.roofline import Prediction

MS = 1e6
# Two devices, two steps in 100 ms: what overlaps counts once, and hidden communication is not
# waited for.
BUSY = {
    0: {
        ("products", ""): [(0, 30 * MS), (20 * MS, 40 * MS)],
        ("attention", ""): [(50 * MS, 60 * MS)],
        ("communication", "fsdp"): [(30 * MS, 50 * MS)],
        ("communication", "tensor"): [(55 * MS, 60 * MS), (90 * MS, 100 * MS)],
    },
    1: {("products", ""): [(0, 100 * MS)]},
}


def test_time_by_part():
    found = measure(BUSY, num_steps=2, data_wait_s=0.01)
    expected = {
        "step_s": 0.05, "products_s": 0.035, "attention_s": 0.0025, "idle_s": 0.0075,
        "exposed_communication_s": 0.005, "data_wait_s": 0.005,
    }  # fmt: skip
    assert found.pop("communication_s") == {
        "fsdp": {"total_s": pytest.approx(0.005), "exposed_s": pytest.approx(0.0025)},
        "tensor": {"total_s": pytest.approx(0.00375), "exposed_s": pytest.approx(0.0025)},
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("products_s", "advice"),
    [(0.02, "above its plan: products, 0.0150 s a step"), (0.04, "idle, 0.0075 s a step")],
)
def test_the_table_has_the_plan_and_what_to_try(products_s, advice):
    plan = Prediction(
        products_s=products_s, attention_s=0.0025, memory_s=0.0, links_s={"fsdp": 0.004},
        hidden_s=0.0, bubble_s=0.0, step_time_s=0.03, tokens_per_s=1.0, mfu_full=0.5,
        mfu_causal=0.4,
    )  # fmt: skip
    found = measure(BUSY, num_steps=2, data_wait_s=0.0)
    head, *rows, last = lines(found, plan)
    assert head.split()[-2:] == ["measured", "planned"]
    table = {row[:34].strip(): row[34:].split() for row in rows}
    assert table["products"] == ["0.0350", f"{products_s:.4f}"]
    assert table["along fsdp"] == ["0.0050", "0.0040"]
    assert table["along tensor"] == ["0.0037", "-"]
    assert advice in last


def test_a_trace_that_fails_ends_no_run(tmp_path):
    """A file is where its folder goes."""
    (tmp_path / "profile").write_text("")
    notes = []
    attempt = types.SimpleNamespace(
        run=types.SimpleNamespace(
            config=types.SimpleNamespace(monitoring=types.SimpleNamespace(profile_steps="3:4")),
            workdir=tmp_path,
            is_primary=True,
        ),
        start=types.SimpleNamespace(step=0),
        progress=types.SimpleNamespace(note=notes.append),
        timer=types.SimpleNamespace(untaken={"data_wait_s": 0.0}),
        phase=lambda *_: contextlib.nullcontext(),
        hang=types.SimpleNamespace(paused=contextlib.nullcontext),
        programs=types.SimpleNamespace(update=types.SimpleNamespace(as_text=lambda: "HloModule m")),
    )
    hook = ProfileHook(attempt)
    for step in (2, 4):
        assert hook.is_due(step, stop=False)
        hook(step, None, stop=False)
    (note,) = notes
    assert note.startswith("warning: monitoring.profile_steps: no profile in ")
    assert not hook.is_due(5, stop=True)
