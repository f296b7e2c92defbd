"""A start that is refused changes nothing on the disk, whatever refuses it and whenever."""

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

import pytest

from llamajax.checkpoint.manifest import find_damage
from llamajax.errors import UserError
from llamajax.prepare import main as prepare

STEPS = {"train.steps": 6}
# By what refuses it: keys of the config; PLACE is a folder with files that the test made.
REFUSALS = {
    "mesh": {"mesh.fsdp": 3},
    "vocabulary": {"model.vocab_size": 200},
    "no data": {"data.path": "PLACE/nothing"},
    "damaged data": {"data.path": "PLACE/damaged"},
    "attention": {"train.attention": "cudnn"},
    "another tokenizer": {"data.path": "PLACE/other_tokenizer", "model.vocab_size": 300},
    "another model": {"model.hidden_size": 64},
    "adapters": {"lora.rank": 2, "train.init_from": "PLACE/nothing"},
    "too few steps": {"train.steps": 1, "optim.warmup_steps": 1},
    "checkpoints of another run": {"checkpoint.directory": "PLACE/owned"},
    "checkpoints in a file": {"checkpoint.directory": "PLACE/file/checkpoints"},
}


def snapshot(*folders: Path) -> dict[str, object]:
    """Every folder, and every file with its contents and the time of its last change."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in paths
        if path.exists()
    }


@pytest.fixture(scope="module")
def place(short_data, tmp_path_factory) -> Path:
    """What the refused configs name."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(short_data, folder / "damaged")
    shard = next((folder / "damaged").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "text.txt").write_text("Another tokenizer is trained on this. " * 300)
    arguments = [f"--input={folder / 'text.txt'}", "--workers=1", "--validation_fraction=0.1"]
    prepare([*arguments, "--tokenizer=train:300", f"--output={folder / 'other_tokenizer'}"])
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
    (workdir / "blackbox").mkdir(exist_ok=True)
    (workdir / "blackbox" / "recent.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    position = json.loads((checkpoints / "2" / "meta.json").read_text())["position"]
    rollback = {"at_step": 4, "to_step": 2, "first_skipped_step": 3, "reason": "test"}
    rollback |= {"segment": position["segments"][0]}
    (workdir / "audit.jsonl").write_text(json.dumps(rollback) + "\n")
    return workdir


@pytest.fixture
def refused(short_run, place):
    """Runs what is refused, and returns the message."""

    def run(workdir: Path, keys: dict[str, object]) -> str:
        keys = {k: str(v).replace("PLACE", str(place)) for k, v in (STEPS | keys).items()}
        with pytest.raises(UserError) as refusal:
            short_run(workdir, **keys)
        return str(refusal.value)

    return run


@pytest.mark.parametrize("name", REFUSALS)
def test_a_used_workdir_stays_as_it_is(used, place, refused, name):
    before = snapshot(used, place)
    refused(used, REFUSALS[name])
    assert snapshot(used, place) == before


@pytest.mark.parametrize("name", ["mesh", "vocabulary", "damaged data", "new folders"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_new_workdir_does_not_come_to_be(tmp_path, place, refused, name, exists):
    workdir = tmp_path / "a" / "b"
    if exists:
        workdir.mkdir(parents=True)
    outside = {"checkpoint.directory": tmp_path / "c" / "d", "train.init_from": "PLACE/nothing"}
    before = snapshot(tmp_path, place)
    refused(workdir, REFUSALS.get(name, outside))
    assert snapshot(tmp_path, place) == before


def test_a_workdir_in_use_stays_as_it_is(used, refused):
    before = snapshot(used)
    with (used / ".lock_0").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is using it" in refused(used, {})
    assert snapshot(used) == before


def test_checkpoints_taken_over_are_given_back(place, tmp_path, refused):
    owner = {"id": "1", "workdir": str(tmp_path / "run"), "host": "a"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "owner.json").write_text(json.dumps(owner))
    keys = {"checkpoint.directory": tmp_path / "checkpoints", "train.init_from": "PLACE/nothing"}
    assert "train.init_from" in refused(tmp_path / "run", keys)
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
    assert names == {"2", "3", "5.damaged"}
    assert (workdir / "blackbox" / "5_killed.jsonl").is_file()
    assert (workdir / "config.json").is_file()
    assert (workdir / "tokenizer" / "tokenizer.byte").is_file()
    assert (workdir / ".lock_0").is_file()
