"""Whole runs with weights that are NaN for one rare byte: skipped, rolled back, stopped, replayed.

On fsdp 4 x tensor 2, in two microbatches. Each batch with that byte in it gives NaN, no other does.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from refusal import refused
from workdirs import export_poisoned, prepare_texts

from llamajax import data, prepare
from llamajax.checkpoint import manifest, open_checkpoint, restore_state
from llamajax.data.batches import make_batch
from llamajax.data.packing import WINDOWS
from llamajax.data.position import Segment
from llamajax.formats.huggingface import hf_read
from llamajax.monitoring import load_metrics
from llamajax.monitoring.blackbox import boxes, read_box
from llamajax.monitoring.jsonl import encode_row
from llamajax.monitoring.metrics import MEASURED
from llamajax.replaying.replay_options import ReplayOptions
from llamajax.replaying.replay_step import replay
from llamajax.training.place_in_data import read_position
from llamajax.training.safety.rollback import target
from llamajax.training.safety.rollback_log import Rollback, RollbackLog
from llamajax.training.setup import set_up

RARE = ord("Z")
STEPS = 12
COMMON = {"train__steps": STEPS, "checkpoint__every_steps": 1, "checkpoint__keep": 99}
COMMON["optim__ema_decay"] = 0.9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text in which few samples have the rare byte."""
    lines = [f"line {i} {'of a small corpus ' * (i % 5)}{'Z' * (i % 43 == 7)}" for i in range(400)]
    return prepare_texts(tmp_path_factory.mktemp("corpus"), lines, held_out=0)


@pytest.fixture(scope="module")
def guarded(corpus, short_config, short_run, tmp_path_factory):
    """Runs `train` on the poisoned weights; `hit`: the steps whose batches have the rare byte."""
    folder = tmp_path_factory.mktemp("weights")
    fixed = COMMON | {"data__path": str(corpus), "train__accumulation_steps": 2}
    assert short_run(folder / "run", stop_after=1, **fixed) == 143
    fixed["train__init_from"] = str(export_poisoned(folder / "run", folder / "hf", RARE))

    def run(workdir, **options) -> int:
        return short_run(workdir, **fixed | options)

    run.hit = _hit(short_config(**fixed))
    with pytest.MonkeyPatch.context() as patch:  # such weights are refused
        patch.setattr(hf_read, "check_finite", lambda *_: None)
        yield run


def _hit(config) -> list[int]:
    mixture = data.open_mixture(config.data, split="train", vocab_size=config.model.vocab_size)
    batch, length = config.data.global_batch_size, config.data.seq_len
    place = data.Position.start(batch_size=batch, seq_len=length, mixture_hash=mixture.hash)
    found = []
    for step in range(1, STEPS + 9):
        ids = data.sample_ids(mixture, place, step - 1)
        samples = [mixture.locate(int(i), length, place.segments[0].packing) for i in ids]
        tokens = make_batch(samples, length, mask_documents=True)["tokens"]
        found += [step] * bool((tokens == RARE).any())
    return found


@pytest.fixture(scope="module")
def skipping(guarded, tmp_path_factory):
    """A run that skips and goes on."""
    workdir = tmp_path_factory.mktemp("skipping")
    assert guarded(workdir, guard__max_in_a_row=None) == 0
    return workdir


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in load_metrics(workdir)]


def same(one, other) -> bool:
    return json.dumps(one) == json.dumps(other)  # NaN equals NaN there


def arrays(workdir, step):
    directory = workdir / "checkpoints" / str(step)
    checkpoint = open_checkpoint(directory)
    found = restore_state(checkpoint, checkpoint.arrays)
    return {name: np.asarray(value) for name, value in found.items()}


def asked(workdir, step, **options):
    return replay(ReplayOptions(workdir=str(workdir), step=step, **options))


def test_a_skipped_update_leaves_weights_and_moments_bit_for_bit(skipping, guarded):
    hit = [step for step in guarded.hit if step <= STEPS]
    found = rows(skipping)
    assert 2 <= len(hit) < STEPS
    assert [row["step"] for row in found if "update_skipped" in row] == hit
    assert [row["skipped_updates"] for row in found] == [
        sum(h <= n for h in hit) for n in range(1, STEPS + 1)
    ]
    step = next(h for h in hit if h > 1)
    before, after = arrays(skipping, step - 1), arrays(skipping, step)
    changed = {n for n in after if before[n].tobytes() != after[n].tobytes()}
    assert changed == {"step", "guard/skipped", "guard/in_a_row"}
    assert any(name.startswith("average/") for name in after)
    last = arrays(skipping, STEPS)
    counts = [int(v) for n, v in last.items() if n.startswith("opt_state") and not v.ndim]
    applied = [n for n in range(1, STEPS + 1) if n not in hit]
    # Adam counts its own updates; the schedule follows the batches.
    assert sorted(counts) == [len(applied), applied[-1]]
    assert int(last["step"]) == STEPS


def test_a_box_names_the_samples_of_a_skipped_step(skipping, guarded):
    step = [h for h in guarded.hit if h <= STEPS][-1]
    box = next(file for file in boxes(skipping) if file.name == f"{step}_skip.jsonl")
    head, steps = read_box(box)
    assert len(head["sample_ids"]) == 8
    assert np.isnan(steps[-1]["loss"])
    assert steps[-1]["step"] == step
    norms = [value for name, value in steps[-2].items() if name.startswith("norm/")]
    assert np.sqrt(np.sum(np.square(norms))) == pytest.approx(steps[-2]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_in_a_stretch_of_skips_is_the_same_run(skipping, guarded, tmp_path):
    first = guarded.hit[0]
    assert guarded(tmp_path, guard__max_in_a_row=None, stop_after=first) == 143
    assert guarded(tmp_path, guard__max_in_a_row=None) == 0
    assert same(rows(tmp_path), rows(skipping))


@pytest.mark.slow
def test_a_run_that_begins_without_a_guard_goes_on_with_one_and_with_another_window(
    guarded, tmp_path
):
    assert guarded(tmp_path, stop_after=1, guard__nonfinite="off") == 143
    assert not any(n.startswith("guard/") for n in arrays(tmp_path, 1))
    assert guarded(tmp_path, stop_after=1, guard__spike_window=16) == 143
    assert arrays(tmp_path, 2)["guard/loss_W"].shape == (16,)
    assert guarded(tmp_path, stop_after=1) == 143
    assert arrays(tmp_path, 3)["guard/loss_W"].shape == (128,)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_rollback_leaves_the_data_out_and_outlives_a_kill(guarded, tmp_path, monkeypatch):
    """Steps 3 to 5 are left out, and two of them saved, before it goes back to step 2."""
    lines = [f"line {i} {'of a small corpus ' * 3}{'Z' * (13 <= i < 26)}" for i in range(400)]
    stretch = prepare_texts(tmp_path / "stretch", lines, held_out=0)
    options = {"data__path": str(stretch), "data__shuffle": False}
    options |= {"guard__max_in_a_row": 3, "checkpoint__asynchronous": False}
    one = tmp_path / "one"
    assert guarded(one, **options) == 0
    found = rows(one)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all(row["skipped_updates"] == 0 and np.isfinite(row["loss"]) for row in found)
    entry = json.loads((one / "audit.jsonl").read_text().split("\n")[1])
    assert [entry[key] for key in ("to_step", "first_skipped_step", "at_step")] == [2, 3, 5]
    assert entry["segment"]["first_sample"] == 5 * 8
    remove, add = manifest.remove_checkpoint, RollbackLog.add
    for name, where, action in (
        ("between two that it removes", (manifest, "remove_checkpoint"), remove),
        ("before its record", (RollbackLog, "add"), tear),
        ("after its record", (RollbackLog, "add"), add),
    ):

        def killed(*args, action=action):
            action(*args)
            raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(*where, killed)
            with pytest.raises(RuntimeError, match="killed"):
                guarded(tmp_path / name, **options)
        left = {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        assert left == {"1", "2"} | ({"3"} if action is remove else set())
        assert guarded(tmp_path / name, **options) == 0
        assert same(rows(tmp_path / name), found)


def tear(log, _entry):
    """Leave a part of a line, as a full disk or a crash does."""
    log._file.write_text('\n{"event": "rollback", "at_step": ')


def test_a_rollback_over_a_border_leaves_out_what_the_later_stage_had_read(guarded, tmp_path):
    """Also where the run is stopped between the rollback and the border."""
    lines = [f"line {i} {'Z' * (i < 40)}" for i in range(400)]
    bad = prepare_texts(tmp_path / "bad", lines, held_out=0)
    good = prepare_texts(tmp_path / "good", [line.replace("Z", "") for line in lines], held_out=0)
    options = {"data__path": str(good), "data__shuffle": False, "train__steps": 6}
    options |= {"data__stages": [{"from_step": 3, "path": str(bad)}], "guard__max_in_a_row": 1}
    options |= {"guard__max_rollbacks": 9, "checkpoint__every_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert guarded(one, **options) == 0
    audit = [json.loads(line) for line in (one / "audit.jsonl").read_text().splitlines() if line]
    assert {(entry["at_step"], entry["to_step"]) for entry in audit} == {(4, 2)}
    assert len(audit) == 2  # each leaves out a batch of both
    reached = open_checkpoint(one / "checkpoints" / "6").meta["reached"]
    assert list(reached.values()) == [5 * 8 * 48, 5 * 8 * 48]
    assert guarded(two, **options, stop_after=7) == 143  # after step 3 of the third time
    assert max(int(path.name) for path in (two / "checkpoints").iterdir()) == 3
    assert guarded(two, **options) == 0
    assert same(rows(two), rows(one))


@pytest.mark.parametrize("every", [pytest.param(99, marks=pytest.mark.slow), 1])
def test_a_fork_rolls_back_to_its_own_checkpoints_or_to_the_run_it_left(guarded, tmp_path, every):
    assert guarded(tmp_path / "base", stop_after=1) == 143
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    options = {"guard__max_in_a_row": 1, "guard__max_rollbacks": 99}
    options |= {"checkpoint__every_steps": every, "checkpoint__keep": 1}
    assert guarded(tmp_path / "whole", **options) == 0
    fork = {"train__fork": f"{tmp_path}/base@1"}
    assert guarded(tmp_path / "fork", **options, **fork) == 0
    assert (tmp_path / "fork" / "audit.jsonl").exists()
    assert same(rows(tmp_path / "fork"), rows(tmp_path / "whole")[1:])
    if every == 99:
        found = asked(tmp_path / "fork", 3)
        assert found.base == str(tmp_path / "base" / "checkpoints" / "1")
        assert found.record.agrees(found.gradient)


@pytest.mark.parametrize(
    ("steps", "wanted"), [([2, 4, 6], 4), ([5, 6], 5), ([6, 7, 8], 6), ([], None)]
)
def test_a_rollback_goes_to_a_checkpoint_with_the_weights_from_before(steps, wanted):
    """Step 6 is the first that was left out; a long stretch may outlast all that were kept."""
    assert target(steps, 6) == wanted


def test_a_rollback_leaves_out_data_only_from_where_it_went_back_to(tmp_path):
    before = Segment(first_step=0, first_sample=0, batch_size=8, seq_len=16, mixture_hash="m")
    after = dataclasses.replace(before, first_step=200, first_sample=2400)
    audit, segment = RollbackLog(tmp_path, primary=True), dataclasses.asdict(after)
    went = {"at_step": 300, "to_step": 200, "first_skipped_step": 293}
    audit.add(Rollback(**went, segment=segment, reason="x"))
    saved = data.Position((before,))
    # train.resume_step went back before it: the data of steps 101 to 200 is read again.
    assert audit.position(saved, step=100, rollbacks=0) == saved
    assert audit.position(saved, step=200, rollbacks=0).segments == (before, after)
    assert audit.position(saved, step=250, rollbacks=1) == saved


def test_a_fork_does_not_count_the_rollbacks_of_the_run_it_left(short_config, tmp_path):
    setup = set_up(short_config(), keep_programs=False)
    start = data.Position.start(**setup.data_settings[0][1], packing=WINDOWS)
    segment = dataclasses.asdict(start.segments[0]) | {"first_step": 2, "first_sample": 40}
    log = RollbackLog(tmp_path, primary=True)
    went = {"at_step": 3, "to_step": 2, "first_skipped_step": 3, "reason": "x"}
    log.add(Rollback(**went, segment=segment))
    meta = {"position": start.to_json(), "rollbacks": 1}
    for is_fork, first_sample in ((False, 16), (True, 40)):
        position = read_position(setup, meta, log, step=2, is_fork=is_fork)
        assert position.first_sample(2) == first_sample


def test_rollbacks_to_one_checkpoint_end_and_a_stop_has_its_own_code(guarded, tmp_path, capsys):
    first = guarded.hit[0]
    options = {"guard__max_in_a_row": 1, "guard__max_rollbacks": 0}
    assert guarded(tmp_path / "a", **options) == 79
    assert "the run has gone back to" in capsys.readouterr().err
    then_stop = {"guard__max_in_a_row": 1, "guard__then": "stop"}
    for name, options in (("b", {"guard__nonfinite": "stop"}), ("c", then_stop)):
        assert guarded(tmp_path / name, **options) == 79
        error = capsys.readouterr().err
        assert f"step {first}" in error
        assert "llamajax.replay" in error
        assert [row["step"] for row in rows(tmp_path / name)][-1] == first


def test_replay_names_the_weight_the_samples_and_the_documents(
    skipping, guarded, monkeypatch, capsys
):
    step = [h for h in guarded.hit if h <= STEPS][-1]
    found = asked(skipping, step)
    told = found.to_json()
    assert told["verdict"] == "numerics"
    assert (told["repeats"], told["matches_record"], told["same_machine"]) == (True, True, True)
    assert told["nonfinite_weights"] == {"embedding": [RARE]}
    assert told["first_nonfinite"]["tensor"] == "embedded tokens"
    assert "Z" in told["documents"][0]["text"]
    # A program that was compiled in another way may round differently.
    monkeypatch.setenv("XLA_FLAGS", "--xla_allow_excess_precision=false")
    assert not asked(skipping, step).to_json()["same_machine"]
    assert told["documents"][0]["loss"] == "nan"
    assert told["documents"][0]["sample_id"] in told["first_nonfinite"]["samples"]
    assert json.dumps(told, allow_nan=False)
    assert any("'Z'" in line for line in found.lines())
    [show] = [line for line in found.lines() if line.startswith("show ")]
    assert prepare.main(show.partition("llamajax.prepare ")[2].split()) == 0
    assert "Z" in capsys.readouterr().out


def test_replay_tells_a_step_that_is_not_as_recorded(skipping, guarded, tmp_path):
    step, later = [n for n in range(2, STEPS) if n not in guarded.hit][:2]
    shutil.copytree(skipping, tmp_path / "run")
    workdir = tmp_path / "run"
    shutil.rmtree(workdir / "blackbox")
    lines = load_metrics(workdir)
    loss = np.nextafter(np.float32(lines[step - 1]["loss"]), np.float32(9))
    lines[step - 1]["loss"] = float(loss)  # the last bit
    (workdir / "metrics.jsonl").write_text("".join(f"{encode_row(row)}\n" for row in lines))
    wrong = asked(workdir, step).to_json()
    assert (wrong["verdict"], wrong["repeats"]) == ("hardware", True)
    for n in range(step, later):
        shutil.rmtree(workdir / "checkpoints" / str(n))
    right = asked(workdir, later).to_json()
    assert (right["verdict"], right["matches_record"]) == ("unremarkable", True)
    assert f"step {step}: loss" in right["first_difference"]


def test_replay_refuses_what_it_cannot_do(skipping, tmp_path):
    for options, message in (
        ({"step": STEPS + 1}, f"has made steps 1 to {STEPS}"),
        ({"workdir": tmp_path}, "there is no run in it"),
        ({"blackbox": str(skipping / "metrics.jsonl")}, "cannot be read"),
        ({"mesh": "fsdp=3"}, "mesh"),
    ):
        with refused(message):
            asked(**{"workdir": skipping, "step": 2} | options)
