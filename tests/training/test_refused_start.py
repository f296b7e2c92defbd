"""A start that is refused changes nothing on the disk, whatever refuses it and whenever."""

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

import pytest
from refusal import refused, snapshot
from workdirs import prepare_texts, write_rows

from llamajax.checkpoint.manifest import find_damage
from llamajax.training.messages import dry_run

STEPS = {"train.steps": 6}
# By what refuses it: keys of the config, and words of the message; PLACE is a folder with files
# that the test made.
REFUSALS = {
    "mesh": ({"mesh.tensor": 3}, "does not make"),
    "vocabulary": ({"model.vocab_size": 200}, "model.vocab_size"),
    "no data": ({"data.path": "PLACE/nothing"}, "nothing"),
    "no validation set": ({"data.validation": "a:PLACE/nothing"}, "/nothing: no such directory"),
    "an empty validation set": ({"data.validation": "a:PLACE/empty"}, "has no token to predict"),
    "no name of a set": ({"data.validation": "a b:PLACE/file"}, "the name 'a b' may have letters"),
    "a validation set of another tokenizer": (
        {"data.validation": "a:PLACE/other_tokenizer"},
        "other_tokenizer was prepared with another tokenizer than ",
    ),
    "no task": ({"train.tasks": "PLACE/file"}, "train.tasks: "),
    "no room for samples": (
        {"train.sample_prompts": "Once", "train.sample_tokens": 9999},
        "set train.sample_tokens to at most",
    ),
    "damaged data": ({"data.path": "PLACE/damaged"}, "bytes, the manifest says"),
    "attention": ({"train.attention": "cudnn"}, "cudnn"),
    "own attention": ({"train.attention": "own_attention:leaks"}, "packed documents"),
    "own attention of a split sequence": (
        {"train.attention": "own_attention:attend", "mesh.sequence": 2, "mesh.fsdp": 2},
        "sees one device's tokens only",
    ),
    "another tokenizer": (
        {"data.path": "PLACE/other_tokenizer", "model.vocab_size": 300},
        "another tokenizer",
    ),
    "another model": ({"model.hidden_size": 64}, "of another model"),
    "another optimizer": ({"optim.name": "muon"}, "was saved with another optimizer"),
    "own optimizer": ({"optim.chain": "own_chain:fails"}, "own_chain.py, line 9: KeyError: rate"),
    "adapters": ({"lora.rank": 2, "train.init_from": "PLACE/nothing"}, "lora.rank"),
    "too few steps": ({"train.steps": 1, "optim.warmup_steps": 1}, "beyond train.steps"),
    "checkpoints of another run": ({"checkpoint.directory": "PLACE/owned"}, "owned"),
    "checkpoints in a file": ({"checkpoint.directory": "PLACE/file/checkpoints"}, "file"),
    "new folders": (
        {"checkpoint.directory": "PLACE/../c/d", "train.init_from": "PLACE/nothing"},
        "train.init_from",
    ),
}


@pytest.fixture(scope="module")
def place(short_data, tmp_path_factory) -> Path:
    """What the refused configs name."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(short_data, folder / "damaged")
    shard = next((folder / "damaged").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    texts = ["Another tokenizer is trained on this."] * 300
    prepare_texts(folder, texts, tokenizer="train:300").rename(folder / "other_tokenizer")
    shutil.copytree(short_data, folder / "empty")
    manifest = json.loads((folder / "empty" / "manifest.json").read_text())
    manifest["splits"]["validation"]["tokens"] = 1
    (folder / "empty" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "owned").mkdir()
    (folder / "owned" / "owner.json").write_text('{"id": "1", "workdir": "/else", "host": "a"}')
    (folder / "file").touch()
    return folder


@pytest.fixture(scope="module")
def used(short_run, tmp_path_factory) -> Path:
    """A workdir in which a start has everything to change: as a run leaves it that was killed."""
    workdir = tmp_path_factory.mktemp("used") / "run"
    assert short_run(workdir, stop_after=4, **STEPS) == 143
    checkpoints = workdir / "checkpoints"
    assert (checkpoints / "2").is_dir()
    assert (checkpoints / "4").is_dir()
    shutil.copytree(checkpoints / "4", checkpoints / "5")  # says that it is another step's
    assert find_damage(checkpoints / "5")
    (checkpoints / "6.orbax-checkpoint-tmp").mkdir()
    write_rows(workdir / "blackbox" / "recent.jsonl", {"step": 5, "loss": 1.0})
    return workdir


@pytest.fixture
def start(short_run, place):
    """Starts a run with keys that name PLACE."""

    def run(workdir: Path, keys: dict[str, object]) -> None:
        keys = {k: str(v).replace("PLACE", str(place)) for k, v in (STEPS | keys).items()}
        short_run(workdir, **keys)

    return run


@pytest.mark.parametrize("name", [name for name in REFUSALS if name != "new folders"])
def test_a_used_workdir_stays_as_it_is(used, place, start, name):
    keys, words = REFUSALS[name]
    with refused(words, unchanged=(used, place)):
        start(used, keys)


@pytest.mark.parametrize(
    "name",
    ["own attention", "another model", "adapters", "too few steps", "checkpoints of another run"],
)
def test_a_dry_run_refuses_what_a_start_refuses(used, place, short_config, name):
    keys, words = REFUSALS[name]
    keys = {k: str(v).replace("PLACE", str(place)) for k, v in (STEPS | keys).items()}
    with refused(words, unchanged=(used, place)):
        list(dry_run(short_config(**keys), workdir=used, overrides={}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "continuing from step 4"),
        ({"train.resume_step": 2}, "continuing from step 2"),
        ({"train.restart": True}, "from the beginning"),
    ],
)
def test_a_dry_run_shows_where_a_start_begins(used, short_config, keys, words):
    config, before = short_config(**STEPS | keys), snapshot(used)
    lines = list(dry_run(config, workdir=used, overrides={}))
    assert f"steps    6, {words}" in lines
    assert snapshot(used) == before


@pytest.mark.parametrize("name", ["mesh", "vocabulary", "own optimizer", "new folders"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_new_workdir_does_not_come_to_be(tmp_path, place, start, name, exists):
    workdir = tmp_path / "a" / "b"
    if exists:
        workdir.mkdir(parents=True)
    keys, words = REFUSALS[name]
    with refused(words, unchanged=(tmp_path, place, place.parent / "c")):
        start(workdir, keys)


@pytest.mark.parametrize(
    ("fork", "keys", "words"),
    [
        ("USED", {}, "is not RUN@STEP"),
        ("PLACE/nothing@2", {}, "is no --workdir of a run"),
        ("USED@3", {}, "complete ones are 2, 4"),
        ("USED@4", {"train.steps": 4}, "leaves no step"),
        ("USED@4", {"model.hidden_size": 64}, "of another model"),
        ("USED@4", {"optim.name": "muon"}, "was saved with another optimizer"),
        ("USED@4", {"checkpoint.directory": "USED/checkpoints"}, "has its checkpoints in"),
        ("USED@4", REFUSALS["another tokenizer"][0], "another tokenizer"),
    ],
)
def test_a_refused_fork_does_not_come_to_be(used, tmp_path, start, fork, keys, words):
    keys = {k: str(v).replace("USED", str(used)) for k, v in ({"train.fork": fork} | keys).items()}
    with refused(words, unchanged=(used, tmp_path)):
        start(tmp_path / "fork", keys)


def test_a_fork_that_has_saved_nothing_begins_nowhere_else(used, short_run, tmp_path):
    keys = STEPS | {"train.fork": f"{used}@2", "checkpoint.every_steps": 99}
    assert short_run(tmp_path / "fork", stop_after=1, **keys) == 143
    shutil.rmtree(tmp_path / "fork" / "checkpoints" / "3")
    lines = (tmp_path / "fork" / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"save"' not in line]  # as if it had been killed
    (tmp_path / "fork" / "events.jsonl").write_text("".join(kept))
    for fork in ("none", f"{used}@4"):
        with refused("would go on from", unchanged=(used, tmp_path)):
            short_run(tmp_path / "fork", **keys | {"train.fork": fork})
    assert short_run(tmp_path / "fork", stop_after=1, **keys) == 143


def test_a_workdir_in_use_stays_as_it_is(used, start):
    with (used / ".lock_0").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with refused("another run is using it", unchanged=(used,)):
            start(used, {})


def test_checkpoints_taken_over_are_given_back(place, tmp_path, start):
    owner = {"id": "1", "workdir": str(tmp_path / "run"), "host": "a"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "owner.json").write_text(json.dumps(owner))
    keys = {"checkpoint.directory": tmp_path / "checkpoints", "train.init_from": "PLACE/nothing"}
    with refused("train.init_from"):
        start(tmp_path / "run", keys)
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "checkpoints" / "owner.json").read_text()) == owner


def test_an_accepted_start_makes_every_change(used, short_run, tmp_path):
    workdir = shutil.copytree(used, tmp_path / "run")
    (workdir / "config.json").unlink()
    (workdir / "tokenizer" / "tokenizer.byte").unlink()  # as a torn copy
    with contextlib.suppress(FileNotFoundError):
        (workdir / ".lock_0").unlink()
    assert short_run(workdir, stop_after=1, **STEPS) == 143
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"2", "4", "5", "5.damaged"}
    assert (workdir / "blackbox" / "5_killed.jsonl").is_file()
    assert (workdir / "config.json").is_file()
    assert (workdir / "tokenizer" / "tokenizer.byte").is_file()
    assert (workdir / ".lock_0").is_file()
