"""The verb convert, as a user runs it: every kind, every tokenizer, every mistake."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import warm
import yaml
from llamas import BASE, export_hf, random_model
from meshes import mesh_of
from refusal import refused
from small_tokenizers import small_ranks, small_sentencepiece
from tiny_state import assert_same_bits
from workdirs import save_checkpoint

from llamajax import convert
from llamajax.data import load_tokenizer
from llamajax.formats.huggingface.model_card import CARD, hub_name
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.tokenizers.tokenizer_export import export_tokenizer

CONFIG = dataclasses.replace(BASE, vocab_size=300)
MODEL = random_model(CONFIG)
READERS = ["library", pytest.param("auto_tokenizer", marks=pytest.mark.live)]
TEXTS = ["Call me Ishmael.", "  two  spaces\n\n\tand a tab", "naïve 東京 😀", " lead", "12345"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face directory of float32 weights with the byte tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "model"
    tokenizer = load_tokenizer("byte")
    export_hf(MODEL, CONFIG, path, tokenizer=tokenizer)
    return path


def run(*flags: str) -> int:
    return convert.main(list(flags))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run that saved the same weights."""
    config = {"model": dataclasses.asdict(CONFIG)}
    path = save_checkpoint(tmp_path_factory.mktemp("run"), 5, {"model": MODEL}, config=config)
    load_tokenizer("byte").save(path)
    return path


@pytest.mark.parametrize("kind", ["huggingface", "llamajax"])
def test_float32_is_converted_bit_for_bit(kind, source, workdir, tmp_path, capsys):
    back = tmp_path / "deeper" / "back"
    path = source if kind == "huggingface" else workdir
    assert run(f"--from={path}", f"--to={back}", "--dtype=float32") == 0
    assert {p.name for p in source.iterdir()} == {p.name for p in back.iterdir()} - {CARD}
    for file in source.iterdir():
        assert file.read_bytes() == (back / file.name).read_bytes(), file.name
    assert_same_bits(open_weights(back).load(abstract_model(CONFIG, mesh_of(fsdp=2))), MODEL)
    out, err = capsys.readouterr()
    assert f"{kind} -> hf" in out
    assert err == ""
    assert list(tmp_path.glob(".*")) == []


def test_the_mean_of_the_last_checkpoints(source, tmp_path, capsys):
    models = [random_model(CONFIG, seed=seed) for seed in range(3)]
    config = {"model": dataclasses.asdict(CONFIG)}
    run_dir, mean = tmp_path / "run", tmp_path / "mean"
    for step, model in enumerate(models, 1):
        save_checkpoint(run_dir, step, {"model": model}, config=config)
    average = ("--average=last:2", "--dtype=float32", "--overwrite", f"--to={mean}")
    for path, pair in ((run_dir, models[1:]), (run_dir / "checkpoints" / "2", models[:2])):
        run(f"--from={path}", *average)
        expected = jax.tree.map(
            lambda a, b: ((np.asarray(a, float) + b) / 2).astype(np.float32), *pair
        )
        assert_same_bits(open_weights(mean).load(abstract_model(CONFIG, mesh_of())), expected)
    assert "average  of steps 1, 2" in capsys.readouterr().err
    for path, number, target, words in (
        (run_dir, "last:4", "x", "3 complete checkpoints up to step 3, not 4"),
        (source, "last:2", "x", "(huggingface) has no earlier checkpoints"),
        (run_dir, "2", "x", "must be last:N"),
        (run_dir, "last:3", "run/checkpoints/1", "holds what is read"),
    ):
        flags = [f"--from={path}", f"--average={number}", f"--to={tmp_path / target}"]
        assert_refused(tmp_path, flags, words)


def test_bfloat16_comes_back_bit_for_bit_and_rounding_is_told(source, tmp_path, capsys):
    first, back = tmp_path / "first", tmp_path / "back"
    run(f"--from={source}", f"--to={first}", "--format=hf", "--max_shard_bytes=9000")
    assert "float32 weights are rounded to bfloat16" in capsys.readouterr().err
    assert (first / "model.safetensors.index.json").is_file()
    run(f"--from={first}", f"--to={back}")
    assert "rounded" not in capsys.readouterr().err
    stored = [open_weights(path).source for path in (first, back)]
    for name in stored[0].names():
        assert stored[0].read(name).tobytes() == stored[1].read(name).tobytes()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken", "huggingface"])
def test_a_tokenizer_goes_along_and_others_read_it_alike(
    kind, reader, source, tmp_path, assets, request
):
    path, size = "byte", 300
    if kind == "sentencepiece":
        path, size = small_sentencepiece(tmp_path, assets), 400
    elif kind == "tiktoken":
        path, size = small_ranks(tmp_path / "ranks.model"), 600
    elif kind == "huggingface":
        path = source / "tokenizer.json"
    config = dataclasses.replace(BASE, vocab_size=size)
    tokenizer = load_tokenizer(path)
    export_hf(random_model(config), config, tmp_path / "hf", tokenizer=tokenizer)
    theirs = request.getfixturevalue(reader)(tmp_path / "hf")
    again = load_tokenizer(open_weights(tmp_path / "hf").tokenizer)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    if reader == "auto_tokenizer":
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert theirs.encode("a")[0] == tokenizer.bos_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids_of(theirs, text) == again.encode(text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


@pytest.fixture
def library():
    """Reads the tokenizer of a directory with the library tokenizers, as transformers does."""
    return lambda folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def auto_tokenizer(live):
    """Reads the tokenizer of a directory with transformers."""
    return live.transformers.AutoTokenizer.from_pretrained


def ids_of(theirs, text: str) -> list[int]:
    """The tokens of a text, no BOS before it."""
    ids = theirs.encode(text, add_special_tokens=False)
    return getattr(ids, "ids", ids)


@pytest.mark.parametrize("name", ["llama2.model", "llama3.model"])
@pytest.mark.parametrize("reader", READERS)
def test_the_real_tokenizers_are_exported_exactly(name, reader, assets, tmp_path, request):
    tokenizer = load_tokenizer(assets / "tokenizers" / name)
    assert export_tokenizer(tokenizer, tmp_path) == []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = request.getfixturevalue(reader)(tmp_path)
    book = (assets / "text" / "moby_dick.txt").read_text("utf-8")
    for text in [*TEXTS, *(book[i : i + 3001] for i in range(0, 150_000, 3001))]:
        ids = tokenizer.encode(text)
        assert ids_of(theirs, text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_companions_of_a_tokenizer_go_along(source, tmp_path):
    own = Path(shutil.copytree(source, tmp_path / "own"))
    (own / "generation_config.json").write_text('{"eos_token_id": [257, 3], "pad_token_id": 300}')
    (own / "chat_template.jinja").write_text("{{ messages }}")
    run(f"--from={own}", f"--to={tmp_path / 'back'}", "--dtype=float32")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (own / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [257, 3], "pad_token_id": 300, "bos_token_id": 256}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, [257, 3])
    assert config["pad_token_id"] is None  # 300 has no row, and Transformers refuses such a config


def test_a_card_goes_along_and_an_edited_one_stays(source, workdir, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for target in (first, second):
        run(f"--from={workdir}", f"--to={target}")
        settings = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
        assert settings["model_max_length"] == CONFIG.max_seq_len
    card = (second / CARD).read_text("utf-8")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "llamajax"],
    }
    assert f"# second\n\n| | |\n| --- | --- |\n| parameters | {num_parameters(CONFIG):,} |" in card
    for row in ("loss", "tokens seen", "trained from", "versions"):
        assert f"| {row}" not in card  # unknown of this run, so left out
    (first / CARD).write_bytes(b"My card\r\n\xff")
    for read in (first, workdir):  # one of a directory that is read goes along
        capsys.readouterr()
        run(f"--from={read}", f"--to={second}", "--overwrite")
        assert (second / CARD).read_bytes() == b"My card\r\n\xff"
    assert f"{second / CARD} was edited, so it stays" in capsys.readouterr().err
    (second / CARD).write_text(card, "utf-8")
    run(f"--from={source}", f"--to={second}", "--overwrite", "--dtype=float32")
    new = (second / CARD).read_text("utf-8")
    assert "| updates | 5 |" in card
    assert "| updates |" not in new
    assert "warning" not in capsys.readouterr().err


def test_the_hub_name_of_weights_in_its_cache(tmp_path):
    folder = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / ("0a" * 20)
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert hub_name(tmp_path / "link") == ("meta-llama/Llama-2-7b-hf", "0a" * 20)
    assert hub_name(folder, "my/own") == ("my/own", None)
    assert hub_name(tmp_path) == (None, None)


def test_without_a_tokenizer_it_warns(source, tmp_path, capsys):
    bare = Path(shutil.copytree(source, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert run(f"--from={bare}", f"--to={tmp_path / 'ours'}") == 0
    assert "warning: " in (err := capsys.readouterr().err)
    assert "no tokenizer" in err


def assert_refused(tmp_path: Path, flags: list[str], *words: str) -> None:
    """The conversion is refused in these words, and nothing in `tmp_path` changes."""
    with refused(*words, unchanged=(tmp_path,)):
        convert.main(flags)


def test_a_tokenizer_of_another_model_is_refused(source, tmp_path):
    small = tmp_path / "small"
    config = dataclasses.replace(BASE, vocab_size=200)
    export_hf(random_model(config), config, small)
    shutil.copyfile(source / "tokenizer.json", small / "tokenizer.json")
    flags = [f"--from={small}", f"--to={tmp_path / 'x'}"]
    assert_refused(tmp_path, flags, "tokenizer.json has 258 tokens", "vocabulary only 200")


def test_targets_that_cannot_be_written_are_refused(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("mine")
    for target, flag, words in (
        (copy, "--overwrite", "holds what is read"),
        (tmp_path, "--overwrite", "holds what is read"),
        (taken, "--overwrite=false", "--overwrite"),
        (taken / "x", "--overwrite", "is a file"),
        (tmp_path / "y", "--format=llamajax", "--format=llamajax: expected hf"),
    ):
        assert_refused(tmp_path, [f"--from={copy}", f"--to={target}", flag], words)
    assert run(f"--from={copy}", f"--to={taken}", "--overwrite") == 0
    assert not (taken / "x").exists()


def test_values_beyond_float16_are_refused(tmp_path):
    large = jax.tree.map(lambda x: x * np.float32(1e7), MODEL)
    export_hf(large, CONFIG, tmp_path / "large")
    flags = [f"--from={tmp_path / 'large'}", f"--to={tmp_path / 'x'}", "--dtype=float16"]
    assert_refused(tmp_path, flags, "65504")


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(tmp_path, [f"--from={source}", f"--to={tmp_path / 'x'}"], "1,000 free")


def test_an_interrupted_conversion_leaves_what_was_there(source, tmp_path):
    """SIGTERM at half the weights, in a process of its own: 143, the old directory, no other."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    script = (
        "import os, signal, sys\n"
        "from llamajax import convert\n"
        "class Stop(convert.BytesProgress):\n"
        "    def __call__(self, phase, done, total):\n"
        "        if done > total / 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "convert.BytesProgress = Stop\n"
        "convert.run_verb(convert.main)\n"
    )
    command = [sys.executable, "-c", script, f"--from={source}", f"--to={target}", "--overwrite"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = warm.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["old", "out"]
