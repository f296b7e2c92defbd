"""The verb `evaluate`: against transformers, against training's own evaluation, and mistakes."""

import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import stored
import tiny_run
from chat_cases import save_byte_level
from llama_cases import (
    CONTEXT,
    EVALUATED,
    PROTOCOLS,
    ROWS,
    TEXT,
    save_hugging_face,
    tokens,
    weights,
)
from meshes import mesh_of
from shell import shell
from tiny_model import COMPUTE
from workdirs import prepare_texts, run_prepare, save_checkpoint, write_rows

from llamajax import data, evaluate, sharding
from llamajax.config import freeze, to_json_dict
from llamajax.data.packing import EXAMPLES
from llamajax.errors import UserError
from llamajax.models.llama import Llama
from llamajax.tokenizers import load_tokenizer
from llamajax.training.step import eval_step

TOLERANCE = 1e-5  # nats: float32 against float32, sums in another order
TASK = """
{"question": "Call me", "choices": ["whales", "Ishmael.", "é"], "answer": 1}
{"ctx": "A whale is ", "endings": [" a fish", "larger"], "label": "1"}
{"question": "", "choices": {"text": ["no", "yes, it is"], "label": ["A", "B"]}, "answerKey": "B"}
"""
CONTRACT = {"loss", "perplexity", "tokens", "platform", "num_devices"}
MISTAKES = {
    "--token_ids=float.npy": "is float64",
    "--token_ids=three.npy": r"shape \(1, 2, 3\)",
    "--token_ids=one.npy": "T >= 2",
    "--token_ids=long.npy": "longer than the model's context of 64",
    "--token_ids=outside.npy": r"token id 258 at \[1, 4\] is outside .* 0\.\.257 .*first of 2",
    "--token_ids=text.txt": "not a NumPy file",
    "--token_ids=pickled.npy": "not a NumPy file",
    "--token_ids=missing.npy": "No such file",
    "--token_ids=ids.npy --text=text.txt": "--text and --token_ids given: name exactly one",
    "": "no source given",
    "--token_ids=ids.npy --seq_len=8 --split=x": "(?s)split=x.*seq_len=8",
    "--data=prepared --protocol=sliding_window": "does not go with --data",
    "--token_ids=ids.npy --per_token_nll=nowhere/out.npy": "no directory",
    "--token_ids=ids.npy --per_token_nll=prepared": "is a directory",
    "--token_ids=ids.npy --per_token_nll=out.npy --max_batches=1": "--max_batches",
    "--token_ids=ids.npy --mesh=fsdp=3": "does not make 8 devices",
    "--token_ids=ids.npy --mesh=sequence=8": "sequence must be 1",
    "--text=empty.txt": "is empty",
    "--text=latin1.txt": "not UTF-8",
    "--text=lines.jsonl": "not plain text",
    "--text=text.txt --seq_len=65": "longer than the model's context",
    "--text=text.txt --stride=8": "--stride belongs to",
    "--text=text.txt --seq_len=8 --protocol=sliding_window --stride=8": "must be below --seq_len=8",
    "--text=text.txt --protocol=sliding_window --stride=0 --batch_size=0": "(?s)stride=0.*size=0",
    "--data=prepared --split=test": "--split=test: .*no test split; it has train, validation",
    "--data=missing": "no such directory",
    "--tasks=missing.jsonl": "--tasks: missing.jsonl: cannot be read: No such file",
    "--tasks=empty.txt": "holds no question",
    "--tasks=lines.jsonl": r"(?s)cannot be used:.*line 1: has no question \(any of question, c",
    "--tasks=task.jsonl,a/task.jsonl": "two files are called task",
    "--tasks=task.jsonl --seq_len=3": "(?s)line 2: .* 'whales' has 7 tokens .*between 1 and 3",
    "--tasks=task.jsonl --max_batches=1": "--max_batches=1 does not go with --tasks",
    "--tasks=task.jsonl --limit=5": "--limit=5 does not go with --tasks: it belongs to --harness",
    "--harness=a": r"--harness needs .* 'lm_eval'\): pip install 'llamajax\[harness\]'",
    "--harness=a --harness_tasks=nowhere": "nowhere: there is no such directory",
    "--tasks=task.jsonl --text=text.txt": "--text and --tasks given",
    "--data=foreign": r"its tokens are 0\.\.284, the vocabulary of the model 0\.\.257",
}


def run(capsys, checkpoint, *args) -> dict:
    assert evaluate.main([f"--checkpoint={checkpoint}", *args]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1, "stdout is the result and nothing else"
    found = json.loads(out[0])
    assert found.keys() >= CONTRACT
    return found


def hugging_face(folder: Path, name: str) -> Path:
    """A model with a tokenizer of bytes, saved in `folder`."""
    config = EVALUATED[name]
    save_hugging_face(folder, config, weights(config, std=0.2))
    save_byte_level(folder / "tokenizer.json", ["<s>", "</s>"], bos="<s>")
    return folder


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("grouped"), "grouped")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["a whale " * (1 + i % 9) + str(i) for i in range(200)]
    for name, tokenizer in (("prepared", "byte"), ("foreign", "train:285")):
        prepare_texts(folder, texts, tokenizer=tokenizer, held_out=0.2).rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A workdir with a checkpoint of step 7, its config and its model."""
    c = tiny_run.get_config(str(prepared / "prepared"))
    c.data.seq_len = 40
    config, workdir = freeze(c), tmp_path_factory.mktemp("run")
    model = jax.jit(lambda key: Llama(config.model, key))(jax.random.key(1))
    save_checkpoint(workdir, 7, {"model": model}, config=to_json_dict(config))
    return workdir, config, model


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_token_ids_equal_transformers(grouped, shape, tmp_path, capsys):
    ids = tokens(EVALUATED["grouped"], shape)
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    out = tmp_path / "out.npy"
    args = (f"--token_ids={tmp_path / 'ids.npy'}", f"--per_token_nll={out}", "--dtype=float32")
    found = run(capsys, grouped, *args)
    expected = stored.arrays("evaluated")[str(shape)]
    written = np.load(out)
    assert (written.dtype, written.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(written, expected, rtol=0, atol=TOLERANCE)
    assert found["loss"] == pytest.approx(expected.mean(), rel=TOLERANCE)
    assert found["perplexity"] == math.exp(found["loss"])
    assert (found["tokens"], found["bytes"], found["bits_per_byte"]) == (expected.size, None, None)
    assert {p.name for p in tmp_path.iterdir()} == {"ids.npy", "out.npy"}


def test_a_width_that_does_not_divide_is_copied_to_all_devices(tmp_path, capsys):
    name = "does not divide"
    hugging_face(tmp_path, name)
    np.save(tmp_path / "ids.npy", tokens(EVALUATED[name], (3, 20)))
    found = run(capsys, tmp_path, f"--token_ids={tmp_path / 'ids.npy'}", "--batch_size=1")
    expected = stored.arrays("evaluated")[name]
    assert found["loss"] == pytest.approx(expected.mean(), rel=TOLERANCE)
    assert (found["dtype"], found["num_devices"], found["step"]) == ("float32", 8, None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_equal_a_loop_with_transformers(grouped, protocol, tmp_path, capsys):
    seq_len, stride = PROTOCOLS[protocol]
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    expected = stored.arrays("evaluated")[protocol]
    args = [f"--protocol={protocol}", f"--seq_len={seq_len}", f"--stride={stride or 'none'}"]
    args += [f"--text={tmp_path / 'text.txt.gz'}", f"--per_token_nll={tmp_path / 'out.npy'}"]
    found = run(capsys, grouped, *args, "--mesh=data=2,fsdp=2,tensor=2")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), [expected], rtol=0, atol=TOLERANCE)
    num_bytes = len(TEXT.encode())
    assert found["tokens"] == len(expected) == num_bytes  # the tokens are bytes, after BOS
    assert found["loss"] == pytest.approx(expected.mean(), rel=TOLERANCE)
    bits = expected.sum() / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=TOLERANCE)
    assert (found["bytes"], found["protocol"]) == (num_bytes, protocol)
    assert (found["seq_len"], found["stride"]) == (seq_len, stride)


def test_tasks_equal_losses_of_the_same_ids(grouped, tmp_path, capsys):
    """The tokens are bytes after BOS, so that what is scored can be written down."""
    (tmp_path / "small.v1.jsonl").write_text(TASK)
    texts = [
        ("Call me", " whales"), ("Call me", " Ishmael."), ("Call me", " é"),
        ("A whale is", "  a fish"), ("A whale is", " larger"), ("", "no"), ("", "yes, it is"),
    ]  # fmt: skip
    tokenizer, ids = load_tokenizer(grouped / "tokenizer.json"), np.zeros((len(texts), 20), int)
    for row, both in zip(ids, texts, strict=True):
        known = [*tokenizer.start_ids, *tokenizer.encode("".join(both))]
        row[: len(known)] = known
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "out.npy"
    run(capsys, grouped, f"--token_ids={tmp_path / 'ids.npy'}", f"--per_token_nll={out}")
    nll = [
        row[len(context.encode()) :][: len(text.encode())].sum()
        for row, (context, text) in zip(np.load(out), texts, strict=True)
    ]
    found = run(capsys, grouped, f"--tasks={tmp_path / 'small.v1.jsonl'}", "--mesh=fsdp=4,tensor=2")
    task = found["tasks"].pop("small")
    assert not found["tasks"]
    assert (task["questions"], task["truncated"]) == (3, 0)
    firsts, right = (0, 3, 5, 7), (1, 4, 6)
    sizes = np.array([6, 8, 2, 7, 6, 2, 10])  # bytes of the choices
    for name, losses in (("accuracy", nll), ("accuracy_by_length", nll / sizes)):
        best = [begin + np.argmin(losses[begin:end]) for begin, end in itertools.pairwise(firsts)]
        assert task[name] == np.mean(np.equal(best, right)), name
    total = sum(nll[i] for i in right)
    assert task["bits_per_byte"] == pytest.approx(total / math.log(2) / 24, rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (26, 24)
    assert found["loss"] == task["loss"] == pytest.approx(total / 26, rel=1e-5)


def test_a_split_gives_the_loss_that_training_logs(trained, capsys):
    workdir, config, model = trained
    found = run(capsys, workdir, f"--data={config.data.path}")
    held_out = data.open_mixture(config.data, split="validation", vocab_size=258)
    mesh, compute = mesh_of(), dataclasses.replace(COMPUTE, attention="blocked")
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    step, sums = eval_step(compute, mesh), np.zeros(2)
    for batch in data.eval_batches(
        held_out, batch_size=8, seq_len=40, packing=EXAMPLES, rows=range(8)
    ):
        sums += np.array(step(placed, sharding.put_batch(batch, mesh)), np.float64)
    assert found["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-6)
    assert (found["tokens"], found["seq_len"], found["step"]) == (sums[1], 40, 7)
    num_bytes = held_out.manifests[0]["splits"]["validation"]["text_bytes"]
    assert found["bits_per_byte"] == pytest.approx(sums[0] / math.log(2) / num_bytes, rel=1e-6)


def test_examples_that_are_cut_are_counted(trained, tmp_path, capsys):
    rows = [{"prompt": "q" * 12, "completion": "a" * n} for n in (15, 15, 60, 15)] * 5
    chats = write_rows(tmp_path / "chats.jsonl", *rows)
    run_prepare(chats, tmp_path / "chats", "--format=instructions", "--validation_fraction=0")
    assert capsys.readouterr()
    args = (f"--data={tmp_path / 'chats'}", "--split=train", "--batch_size=8")
    assert evaluate.main([f"--checkpoint={trained[0]}", *args]) == 0
    out, err = capsys.readouterr()
    found, learned = json.loads(out), 3 * 16 + 61
    assert (found["cut_examples_share"], found["cut_loss_share"]) == (0.25, 61 / learned)
    assert found["tokens"] == 5 * learned
    assert "warning: 25.0% of the examples, with 56.0% of the tokens that are scored," in err


def test_a_part_of_a_split_has_no_bits_per_byte(trained, tmp_path, capsys):
    workdir, config, _ = trained
    args = (f"--data={config.data.path}", "--batch_size=8", f"--per_token_nll={tmp_path / 'o.npy'}")
    some = run(capsys, workdir / "checkpoints" / "7", *args, "--max_batches=2", "--split=train")
    assert (some["bits_per_byte"], some["bytes"]) == (None, None)
    losses = np.load(tmp_path / "o.npy")
    assert losses.shape == (1, some["tokens"])
    assert some["loss"] == pytest.approx(losses.mean(dtype=np.float64), rel=1e-12)


def test_data_of_another_tokenizer_is_refused(trained, prepared, tmp_path):
    _, config, model = trained
    tree = to_json_dict(config)
    tree["model"]["vocab_size"] = 300  # large enough for both
    save_checkpoint(tmp_path, 1, {"model": model}, config=tree)
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        evaluate.main([f"--checkpoint={tmp_path}", f"--data={prepared / 'foreign'}"])


def test_a_model_without_a_tokenizer_reads_no_text(grouped, tmp_path):
    for file in grouped.iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UserError, match="no tokenizer, and --text needs one"):
        evaluate.main([f"--checkpoint={tmp_path}", f"--text={tmp_path / 'text.txt'}"])


@pytest.fixture(scope="module")
def wrong(prepared):
    """A folder of inputs that cannot be used, and some that can."""
    outside = np.zeros((3, 9), int)
    outside[1, 4], outside[2, 0] = 258, -1
    for name, array in {
        "float": np.zeros(5),
        "three": np.zeros((1, 2, 3), int),
        "one": np.zeros((4, 1), int),
        "long": np.zeros((2, CONTEXT + 1), int),
        "outside": outside,
        "pickled": np.array([{}, 1], object),
        "ids": np.zeros((2, 5), int),
    }.items():
        np.save(prepared / f"{name}.npy", array, allow_pickle=True)
    (prepared / "empty.txt").write_text("")
    (prepared / "text.txt").write_text(TEXT)
    (prepared / "task.jsonl").write_text(TASK)
    (prepared / "lines.jsonl").write_text("{}\n")
    (prepared / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    return prepared


@pytest.mark.parametrize("args", MISTAKES)
def test_mistakes_are_told(grouped, wrong, args, monkeypatch):
    monkeypatch.chdir(wrong)
    before = sorted(wrong.iterdir())
    with pytest.raises(UserError, match=MISTAKES[args]):
        evaluate.main([f"--checkpoint={grouped}", *args.split()])
    assert sorted(wrong.iterdir()) == before


def test_from_the_shell(grouped, wrong):
    done = shell("evaluate", f"--checkpoint={grouped}", f"--token_ids={wrong / 'ids.npy'}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["tokens"] == 8
    assert last["platform"] == "cpu"
