"""Runs whose data, lengths and batches change at certain steps (`data.stages`)."""

import json
import shutil
from functools import partial

import pytest
from refusal import refused
from shell import SHORT, train_command
from workdirs import logged, prepare_texts, read_rows

from llamajax.config.model_schema import RopeScaling
from llamajax.formats.weights import open_weights
from llamajax.monitoring import load_events
from llamajax.proving.trial import has_chosen_start, newest_checkpoint, read_meta, run_trial

SCALING = {"factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 64}
STEPS = 7


@pytest.fixture(scope="module")
def staged(short_data, short_run, tmp_path_factory):
    """Runs `train`: from step 2 on larger batches, from step 4 on longer samples of more text."""
    texts = [f"other text {i} {'xyz' * (i % 9)}" for i in range(300)]
    other = prepare_texts(tmp_path_factory.mktemp("other"), texts)
    ramp = {"from_step": 2, "global_batch_size": 16, "accumulation_steps": 2}
    longer = {"from_step": 4, "path": f"{short_data},{other}", "weights": [1, 3]}
    longer |= {"seq_len": 96, "rope_scaling": SCALING}

    def run(workdir, *, stop_after=None, ramp=ramp, longer=longer, **keys):
        fixed = {"train__steps": STEPS, "train__eval_every": 3, "checkpoint__keep": 9}
        fixed["data__stages"] = [stage for stage in (ramp, longer) if stage]
        return short_run(workdir, stop_after=stop_after, **fixed | keys)

    run.ramp, run.longer = ramp, longer
    return run


@pytest.fixture(scope="module")
def tokenized_otherwise(tmp_path_factory):
    """A folder with data of another tokenizer."""
    texts = ["Another tokenizer is trained on this."] * 300
    return prepare_texts(tmp_path_factory.mktemp("other"), texts, tokenizer="train:300").parent


@pytest.fixture(scope="module")
def undisturbed(staged, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert staged(workdir, train__sample_prompts=["a line"], train__sample_tokens=4) == 0
    return workdir


def test_tokens_rates_events_and_checkpoints_follow_the_stages(undisturbed, staged, capsys):
    rows = [row for row in logged(undisturbed) if "loss" in row]
    tokens = [8 * 48] * 2 + [16 * 48] * 2 + [16 * 96] * 3
    assert [row["tokens_seen"] for row in rows] == [sum(tokens[: n + 1]) for n in range(STEPS)]
    assert rows[-1]["learning_rate"] == 0  # a schedule is one of steps
    found = [event for event in load_events(undisturbed) if event["event"] == "stage"]
    assert [(e["number"], e["step"], e["tokens_seen"]) for e in found] == [
        (1, 2, sum(tokens[:2])),
        (2, 4, sum(tokens[:4])),
    ]
    evaluated = {row["step"]: row for row in read_rows(undisturbed / "metrics.jsonl")}
    assert sorted(n for n, row in evaluated.items() if "eval_loss" in row) == [3, 6, 7]
    assert [row["step"] for row in read_rows(undisturbed / "samples.jsonl")] == [3, 6, 7]
    scaled = {
        step: open_weights(undisturbed / "checkpoints" / str(step)).model.rope_scaling
        for step in (2, 4, 6)
    }
    assert scaled == {2: None, 4: None, 6: RopeScaling(**SCALING)}
    facts = json.loads((undisturbed / "run.json").read_text())["stages"]
    assert [stage["first_step"] for stage in facts] == [0, 2, 4]
    assert len({stage["program"] for stage in facts}) == 3
    assert staged(undisturbed) == 0  # a finished run
    assert "finished before, at step 7" in capsys.readouterr().err


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_is_the_same_run(undisturbed, staged, compiled_once, tmp_path, step):
    """Before a border, at one after a kill, and at one: stages that have ended are not compiled."""
    assert staged(tmp_path, stop_after=step) == 143
    if step == 3:  # not saved
        shutil.rmtree(tmp_path / "checkpoints" / "3")
    compiled_once.clear()
    assert staged(tmp_path) == 0
    assert logged(tmp_path) == logged(undisturbed)
    assert compiled_once == [(8, 48), (16, 48), (16, 96)][{1: 0, 3: 1, 4: 2}[step] :]


def test_an_evaluation_missed_at_a_border_is_of_the_stage_before(staged, compiled_once, tmp_path):
    assert staged(tmp_path, stop_after=4, train__eval_every=4) == 143
    compiled_once.clear()
    assert staged(tmp_path, stop_after=1, train__eval_every=4) == 143
    assert compiled_once == [(16, 48), (16, 96)]
    (row,) = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval_loss" in row]
    assert row["step"] == 4


def test_a_fork_at_a_border_goes_on_with_the_next_stage(undisturbed, staged, tmp_path):
    assert staged(tmp_path, train__fork=f"{undisturbed}@4") == 0
    assert logged(tmp_path) == [row for row in logged(undisturbed) if row["step"] > 4]


def test_stages_that_have_begun_stay_and_later_ones_may_change(staged, tmp_path, capsys):
    assert staged(tmp_path, stop_after=3) == 143
    for ramp in ({"from_step": 1}, {"global_batch_size": 8}, {"rope_scaling": SCALING}, None):
        ramp = ramp and staged.ramp | ramp
        with refused("until step 3 this run has read 8 x 48", "8 x 48 of", unchanged=(tmp_path,)):
            staged(tmp_path, ramp=ramp)
    shorter = {"from_tokens": 2 * 8 * 48 + 3 * 16 * 48, "seq_len": 24}
    assert staged(tmp_path, longer=shorter) == 0
    tokens = [row["tokens_seen"] for row in logged(tmp_path) if "loss" in row]
    assert tokens[-3:] == [tokens[4], tokens[4] + 16 * 24, tokens[4] + 2 * 16 * 24]
    assert "changed since step 3: data.stages: [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"path": "PLACE/nothing"}, "data.stages[0]: data.path: PLACE/nothing: no such directory"),
        ({"path": "PLACE/data"}, "was prepared with another tokenizer than"),
        ({"seq_len": 10**6, "max": True}, "data.stages[0]: the data cannot be used"),
        ({"global_batch_size": 6}, "data.stages[0], from step 2 on: data.global_batch_size = 6"),
        ({"seq_len": 47}, "data.seq_len = 47 does not divide by 2"),
    ],
)
def test_a_stage_that_does_not_fit_ends_the_run_at_its_start(
    staged, tokenized_otherwise, tmp_path, stage, words
):
    place = str(tokenized_otherwise)
    keys = {"model__max_seq_len": 10**7} if stage.pop("max", None) else {}
    stage = {k: v.replace("PLACE", place) if k == "path" else v for k, v in stage.items()}
    words = words.replace("PLACE", place)
    with refused("data.stages[0]", words, unchanged=(tmp_path,)):
        staged(
            tmp_path / "run",
            ramp={"from_step": 2} | stage,
            longer=None,
            model__vocab_size=300,
            **keys,
        )


@pytest.mark.slow
def test_killed_at_borders_and_random_moments_it_is_the_same_run(staged, short_data, tmp_path, rng):
    stages = json.dumps([staged.ramp | {"from_step": 7}, staged.longer | {"from_step": 13}])
    keys = SHORT | {"train.steps": 20, "train.eval_every": 5, "data.stages": stages}

    def command(workdir):
        return train_command(short_data, workdir, keys | {"checkpoint.every_steps": 3})

    assert (
        run_trial(
            command(tmp_path / "whole"), workdir=tmp_path / "whole", log=tmp_path / "log"
        ).code
        == 0
    )
    workdir, log = tmp_path / "killed", tmp_path / "log"

    def at_border(step):
        events = load_events(workdir)
        begun = max((n for n, e in enumerate(events) if e["event"] == "start"), default=0)
        return any(e["event"] == "stage" and e["step"] == step for e in events[begun:])

    def after_save():
        return newest_checkpoint(workdir) > saved

    moments = [after_save, partial(at_border, 7), after_save, partial(at_border, 13)]
    codes = []
    for moment in [*moments, after_save, partial(has_chosen_start, log)]:
        saved, delay_s = newest_checkpoint(workdir), rng.choice((0.0, 0.02, 0.1))
        result = run_trial(
            command(workdir), workdir=workdir, log=log, kill_when=moment, delay_s=delay_s
        )
        codes.append(result.code)
    assert set(codes) <= {None, 0}, log.read_text()
    assert codes.count(None) >= 4
    assert run_trial(command(workdir), workdir=workdir, log=log).code == 0
    assert logged(workdir) == logged(tmp_path / "whole")
    ledgers = [read_meta(tmp_path / name, 20)["ledger"] for name in ("killed", "whole")]
    assert ledgers[0] == ledgers[1]
