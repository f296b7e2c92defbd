"""Evaluations of whole runs: several validation sets, and samples of fixed prompts."""

import contextlib
import io
import json

import pytest
from refusal import refused
from workdirs import logged, prepare_texts, read_rows, run_prepare, write_rows

from llamajax import evaluate, generate
from llamajax.decoding.engine import Engine
from llamajax.errors import UserError
from llamajax.monitoring import load_events

PROMPTS = ("abc, ", "line \x1b[31m 1")
KEYS = {"train__steps": 4, "train__eval_every": 2, "train__eval_batches": None}
AVERAGED = {"optim__ema_decay": 0.5}
SAMPLED = {"train__sample_prompts": PROMPTS, "train__sample_tokens": 9}


def rows_of(workdir):
    """The evaluations of a run, without their times and tasks."""
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "eval_tokens" in row]
    return [
        {name: row[name] for name in row if name != "time_s" and not name.startswith("task/")}
        for row in rows
    ]


def tasks_of(workdir):
    """The figures of tasks in the last row that has some, by name."""
    rows = read_rows(workdir / "metrics.jsonl")
    figures = [{k: v for k, v in row.items() if k.startswith("task/")} for row in rows]
    return [each for each in figures if each][-1]


def samples_of(workdir):
    return [(r["step"], r["index"], r["text"]) for r in read_rows(workdir / "samples.jsonl")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three more directories: with a validation split, without one, and of instructions."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("split", "whole")}
    texts = ["Other words, in other numbers. " * 9, "And more of them than before. " * 5] * 9
    held_out = {"split": 0.3, "whole": 0}
    found = {name: prepare_texts(folders[name], texts, held_out=held_out[name]) for name in folders}
    chats = tmp_path_factory.mktemp("chats")
    rows = [{"prompt": f"line {n}, " * 3, "completion": "seven lines"} for n in range(9)]
    flags = ("--format=instructions", "--validation_fraction=0")
    run_prepare(write_rows(chats / "in.jsonl", *rows), chats / "data", *flags)
    return found | {"chats": chats / "data"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two files of multiple choice; questions of the second are longer than a sample."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = ["line of 4", "seven lines 4", "4"]
    for name, text in {"short": "abc, line", "long": "line 12, " * 9}.items():
        rows = [{"question": f"{text} {n}", "choices": choices, "answer": n % 3} for n in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "short.jsonl"), str(folder / "long.jsonl")]


@pytest.fixture(scope="module")
def plain(short_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    assert short_run(workdir, **KEYS) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(short_run, sets, tasks, tmp_path_factory):
    """A run with two more sets, tasks and samples, stopped where it evaluates, and resumed."""
    workdir = tmp_path_factory.mktemp("stopped")
    keys = KEYS | SAMPLED | AVERAGED | {"data__validation": sets, "train__tasks": tasks}
    assert short_run(workdir, **keys, stop_after=2) == 143
    assert not (workdir / "samples.jsonl").exists() or samples_of(workdir) == []
    assert short_run(workdir, **keys) == 0
    return workdir


def test_training_and_its_own_split_stay_as_they_are(stopped, plain):
    assert logged(stopped) == logged(plain)
    assert [row["step"] for row in rows_of(stopped)] == [2, 4]
    record = json.loads((stopped / "run.json").read_text())
    assert (record["samples_problem"], record["tasks_problem"]) == (None, None)


def test_each_set_has_the_numbers_of_evaluate(stopped, sets, capsys):
    last = rows_of(stopped)[-1]
    splits = {"split": "validation", "whole": "train", "chats": "train"}
    for name, path in sets.items():
        flags = [f"--checkpoint={stopped}", f"--data={path}", f"--split={splits[name]}"]
        assert evaluate.main([*flags, "--dtype=float32", "--seq_len=48"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert last[f"eval_tokens/{name}"] == found["tokens"]
        keys = ("loss", "perplexity", "bits_per_byte")
        for key in keys[:2] if name == "chats" else keys:  # whole examples, though text is trained
            assert last[f"eval_{key}/{name}"] == pytest.approx(found[key], rel=1e-5)
        assert 0 < abs(last[f"ema_loss/{name}"] - last[f"eval_loss/{name}"]) < 1
    (event,) = [e for e in load_events(stopped) if e["event"] == "evaluation" and e["step"] == 4]
    losses = {name: last[name] for name in event if name.startswith("eval_loss")}
    assert {name: event[name] for name in losses} == losses
    assert len(losses) == 4


def test_tasks_have_the_numbers_of_evaluate(stopped, tasks, capsys):
    flags = [f"--checkpoint={stopped}", f"--tasks={','.join(tasks)}", "--seq_len=48"]
    assert evaluate.main([*flags, "--dtype=float32"]) == 0
    captured, last = capsys.readouterr(), tasks_of(stopped)
    assert "warning: task long: 8 of 8 questions are longer than the context" in captured.err
    found = json.loads(captured.out)["tasks"]
    assert len(last) == 3 * len(found) == 6
    for name, figures in found.items():
        assert last[f"task/{name}/bits_per_byte"] == pytest.approx(figures["bits_per_byte"], 1e-5)
        for key in ("accuracy", "accuracy_by_length"):
            assert last[f"task/{name}/{key}"] == figures[key]


def test_samples_are_what_generate_writes(stopped, capsys):
    assert [row[:2] for row in samples_of(stopped)] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for number, prompt in enumerate(PROMPTS):
        flags = [f"--prompt={prompt}", "--max_new_tokens=9", "--dtype=float32", "--json"]
        assert generate.main([f"--checkpoint={stopped}", *flags]) == 0
        text = json.loads(capsys.readouterr().out)["text"]
        assert samples_of(stopped)[2 + number] == (4, number, text)


def test_a_kill_before_the_row_repeats_the_row_and_no_sample(stopped, short_run, sets):
    before = (rows_of(stopped), samples_of(stopped))
    for name, lost in (("metrics.jsonl", 1), ("events.jsonl", 2)):  # the row; evaluation and end
        lines = (stopped / name).read_text().splitlines(keepends=True)
        (stopped / name).write_text("".join(lines[:-lost]))
    assert len(rows_of(stopped)) == 1
    assert short_run(stopped, **KEYS, **SAMPLED, **AVERAGED, data__validation=sets) == 0
    assert (rows_of(stopped), samples_of(stopped)) == before


ALONE = SAMPLED | {"train__sample_temperature": 1.0, "train__steps": 3}
ALONE |= {"monitoring__progress": "lines", "train__eval_batches": None}


@pytest.fixture(scope="module")
def alone(short_run, sets, tasks, tmp_path_factory):
    """A run whose data has no validation split of its own, and what it printed."""
    workdir, said = tmp_path_factory.mktemp("alone"), io.StringIO()
    with contextlib.redirect_stderr(said):
        keys = ALONE | {"data__validation": sets, "train__tasks": tasks}
        assert short_run(workdir, data__path=sets["whole"], **keys) == 0
    return workdir, said.getvalue()


def test_without_a_split_of_its_own_all_targets_count(alone, sets):
    workdir, said = alone
    assert "warning: data.validation: whole is what the run trains on, not held out" in said
    (row,) = rows_of(workdir)
    counts = {name: row[f"eval_tokens/{name}"] for name in sets}
    assert row["eval_tokens"] == sum(counts.values())
    mean = sum(row[f"eval_loss/{name}"] * counts[name] for name in sets) / row["eval_tokens"]
    assert row["eval_loss"] == pytest.approx(mean, rel=1e-12)


def test_tasks_are_shown_and_warned_of_once(alone):
    accuracy = tasks_of(alone[0])["task/short/accuracy"]
    assert f"short accuracy {accuracy:.3f}" in alone[1]
    assert alone[1].count("warning: task long: 8 of 8 questions are longer") == 1


def test_samples_are_shown_without_escape_codes(alone):
    assert "sample   line  [31m 1 | " in alone[1]


def test_decoding_that_fails_costs_no_row(short_run, tmp_path, monkeypatch):
    saved = {"checkpoint__every_steps": 2, "monitoring__progress": "lines"}

    def fails(*_, **__):
        raise MemoryError("of a device")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", fails)
        with pytest.raises(MemoryError):
            short_run(tmp_path, **KEYS, **SAMPLED, **saved)
    assert [row["step"] for row in rows_of(tmp_path)] == [2]
    assert short_run(tmp_path, **KEYS, **SAMPLED, **saved) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4]
    assert [row[:2] for row in samples_of(tmp_path)] == [(4, 0), (4, 1)]


def test_decoding_that_does_not_compile_ends_the_run_at_its_start(short_run, tmp_path, monkeypatch):
    def decode(*_):
        raise UserError("decoding needs more memory than a device has")

    monkeypatch.setattr(Engine, "_decode", decode)
    with refused("more memory than a device has", unchanged=(tmp_path,)):
        short_run(tmp_path / "run", **KEYS, **SAMPLED)


@pytest.mark.slow
def test_a_mesh_that_splits_rows_changes_neither_samples_nor_tasks(
    alone, short_run, sets, tasks, tmp_path
):
    keys = ALONE | {"mesh.fsdp": 2, "mesh.sequence": 2, "train__tasks": tasks}
    assert short_run(tmp_path, data__path=sets["whole"], **keys) == 0
    assert tasks_of(tmp_path) == pytest.approx(tasks_of(alone[0]), rel=1e-5)
    assert samples_of(tmp_path) == samples_of(alone[0])
    assert len({text for _, _, text in samples_of(tmp_path)}) == 2
    assert rows_of(tmp_path) == []


@pytest.mark.slow
def test_a_pipeline_trains_without_samples_and_says_so(short_run, tasks, tmp_path, capfd):
    mesh = {"mesh.stage": 2, "mesh.fsdp": 2, "model.num_layers": 2, "data.mask_documents": False}
    keys = {"train__sample_prompts": ["a"], "train__steps": 3, "train__tasks": tasks}
    assert short_run(tmp_path, **keys, **mesh) == 0
    flags = [f"--checkpoint={tmp_path}", f"--tasks={','.join(tasks)}", "--seq_len=48"]
    assert evaluate.main([*flags, "--dtype=float32"]) == 0
    captured, in_the_run = capfd.readouterr(), tasks_of(tmp_path)
    found = json.loads(captured.out.splitlines()[-1])["tasks"]
    for name, figures in found.items():
        bits = in_the_run[f"task/{name}/bits_per_byte"]
        assert bits == pytest.approx(figures["bits_per_byte"], rel=1e-5)
    record = json.loads((tmp_path / "run.json").read_text())
    assert "48 choices has a row" in record["tasks_problem"]
    assert f"warning: train.tasks: {record['tasks_problem']}" in captured.err
    problem = record["samples_problem"]
    assert "2 pipeline stages cannot decode" in problem
    assert captured.err.count(f"warning: train.sample_prompts: {problem}") == 1
    assert not (tmp_path / "samples.jsonl").exists()
