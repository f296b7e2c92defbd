"""A run that is resumed with another tokenizer is refused; other data and keys are reported."""

import shutil
from pathlib import Path

import jax
import pytest
from refusal import refused
from workdirs import prepare_texts

from llamajax import convert, evaluate, generate
from llamajax.checkpoint import open_checkpoint
from llamajax.data import load_tokenizer
from llamajax.optim import schedule
from llamajax.training.run_start import changes
from llamajax.training.setup import set_up

PIECES = 300
KEYS = {"model.vocab_size": PIECES, "train.steps": 6, "optim.warmup_steps": 1}
TEXTS = ("abcdefgh ijkl the quick brown fox", "zyxwvuts mnop what jumps over lazy dogs")


def prepared(folder: Path, text: str, *, tokenizer: Path | str, repeats: int = 60) -> Path:
    """Data in the same place each time."""
    texts = (f"{text} number {i}" for i in range(repeats))
    return prepare_texts(folder, texts, "--overwrite", tokenizer=str(tokenizer), held_out=0.1)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Path]:
    """Two tokenizers of the same size."""
    folders = [tmp_path_factory.mktemp(f"tokenizer_{n}") for n in (0, 1)]
    pairs = zip(folders, TEXTS, strict=True)
    return [prepared(f, text, tokenizer=f"train:{PIECES}") / "tokenizer.model" for f, text in pairs]


@pytest.fixture(scope="module")
def begun(short_run, tokenizers, tmp_path_factory) -> Path:
    """A folder with `data`, and a `run` of it that stopped at step 2."""
    folder = tmp_path_factory.mktemp("begun")
    data = prepared(folder, TEXTS[0], tokenizer=tokenizers[0])
    assert short_run(folder / "run", stop_after=2, **KEYS, **{"data.path": str(data)}) == 143
    return folder


@pytest.fixture
def resumed(begun, short_run, tmp_path):
    """Resumes a copy of the run, with data that may have been prepared again in its place."""
    shutil.copytree(begun / "run", tmp_path / "run")

    def run(**keys) -> Path:
        try:
            keys = KEYS | {"data.path": str(begun / "data")} | keys
            short_run(tmp_path / "run", stop_after=1, **keys)
        finally:
            prepared(begun, TEXTS[0], tokenizer=begun / "run" / "tokenizer")
        return tmp_path / "run"

    return run


def test_another_tokenizer_of_the_same_size_is_refused(begun, tokenizers, resumed, tmp_path):
    kept = tmp_path / "run" / "tokenizer"
    prepared(begun, TEXTS[0], tokenizer=tokenizers[1])
    prints = [load_tokenizer(tokenizer).fingerprint[:12] for tokenizer in tokenizers]
    words = (f"(sentencepiece, {PIECES} tokens, fingerprint {each})" for each in prints)
    with refused(*words, f"with --tokenizer={kept}", unchanged=(kept,)):
        resumed()


def test_other_data_and_keys_are_reported_and_the_run_goes_on(
    begun, tokenizers, resumed, short_config, capsys
):
    prepared(begun, TEXTS[0], tokenizer=tokenizers[0], repeats=80)
    workdir = resumed(**{"train.steps": 12, "optim.clip_norm": None})
    told = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
    optim = short_config(**KEYS).optim
    old, new = (f"{float(schedule(optim, steps=steps)(3)):.6g}" for steps in (6, 12))
    assert old != new
    assert told[:3] == [
        "changed since step 2: optim.clip_norm: 1.0 -> none",
        "changed since step 2: train.steps: 6 -> 12",
        f"changed since step 2: learning rate of step 3: {old} -> {new}",
    ]
    data = begun / "data"
    assert told[3].startswith(f"data changed since step 2: train split of {data}: 54 documents, ")
    assert " -> 72 documents, " in told[3]
    assert told[4].startswith(f"data changed since step 2: validation split of {data}: 6 doc")
    assert len(told) == 5
    assert (workdir / "checkpoints" / "3").is_dir()


def test_what_a_resume_converts_and_what_it_does_not_read_is_said(resumed, tmp_path, capsys):
    workdir = resumed(**{"optim.moment_dtype": "bfloat16", "train.init_from": str(tmp_path)})
    said = capsys.readouterr().err
    assert "changed since step 2: optim.moment_dtype: float32 -> bfloat16\n" in said
    assert "the moments of step 2 are converted to bfloat16\n" in said
    assert "warning: train.init_from counts where a run begins, and this one goes on from" in said
    arrays = open_checkpoint(workdir / "checkpoints/3").arrays.items()
    for moment in ("/mu/", "/nu/"):
        assert {array.dtype.name for name, array in arrays if moment in name} == {"bfloat16"}


def test_nothing_is_reported_where_nothing_changed(begun, short_config):
    config = short_config(**KEYS, **{"data.path": str(begun / "data")})
    setup = set_up(config, keep_programs=False)
    stored = open_checkpoint(begun / "run" / "checkpoints" / "2")
    assert list(changes(setup, stored)) == []
    for name, array in stored.arrays.items():  # as older versions did with optim.moment_dtype
        if "/mu/" in name:
            stored.arrays[name] = jax.ShapeDtypeStruct(array.shape, "bfloat16")
    assert list(changes(setup, stored)) == ["the moments of step 2 are converted to float32"]
    stored.meta["config"]["data"]["stages"] = [{"from_step": 5, "seq_len": 24}]
    stored.meta["data"]["data.stages[0]"] = "other text"
    *told_of_keys, told_of_data = changes(setup, stored)
    assert told_of_keys[0].endswith('data.stages: [{"from_step": 5, "seq_len": 24}] -> none')
    assert told_of_data == "data changed since step 2: data.stages[0]: other text -> none"
    del stored.meta["data"]  # as in checkpoints of older versions
    assert list(changes(setup, stored)) == told_of_keys


@pytest.fixture
def mistaken(begun, tokenizers, tmp_path) -> Path:
    """The run with another tokenizer in the place of its own."""
    run = shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copy(tokenizers[1], run / "tokenizer" / "tokenizer.model")
    return run


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (generate, ["--checkpoint={run}", "--prompt=a"]),
        (evaluate, ["--checkpoint={run}", "--text={text}"]),
        (convert, ["--from={run}", "--to={out}"]),
    ],
)
def test_weights_with_another_tokenizer_are_not_used(mistaken, verb, flags):
    names = {"run": mistaken, "text": mistaken.with_name("plain.txt"), "out": mistaken / "../out"}
    names["text"].write_text("some text")
    with refused("put that tokenizer back", unchanged=(mistaken.parent,)):
        verb.main([flag.format(**names) for flag in flags])


def test_a_run_does_not_begin_from_weights_with_another_tokenizer(mistaken, begun, short_run):
    keys = KEYS | {"data.path": str(begun / "data"), "train.init_from": mistaken}
    with refused("put that tokenizer back"):
        short_run(mistaken.with_name("new"), **keys)
