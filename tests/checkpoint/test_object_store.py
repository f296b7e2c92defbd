"""Checkpoints at a URL: what a disk promises, an object store keeps as well."""

import json
import os
import subprocess
import time

import jax
import pytest
import warm
from object_store import BUCKET, environment, kinds, need_package, running
from old_run import unpack_data
from refusal import refused
from shell import free_port, shell, train_command
from tiny_state import (
    META,
    abstract,
    assert_same_bits,
    checkpointer,
    flip,
    make_state,
    newest,
    remove,
    restore,
    truncate,
)
from two_savers import run_both
from workdirs import logged

from llamajax.backends import object_stores
from llamajax.checkpoint import (
    CheckpointError,
    complete_steps,
    location,
    manifest,
    newest_checkpoint,
    restore_state,
)
from llamajax.checkpoint.directory_owner import OWNER, check_owner, claim
from llamajax.errors import TransientError
from llamajax.formats.weights import open_weights
from llamajax.training.workdir import previous_checkpoint


def url_of(kind, folder):
    return f"{'s3' if kind == 'moto' else kind}://{BUCKET}/{folder}"


@pytest.fixture(scope="module", params=kinds())
def store(request):
    """The kind of a store that is empty at first."""
    need_package(request.param)
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, running(request.param, port):
        for name, value in environment(port).items():
            patch.setenv(name, value)
        yield request.param


@pytest.fixture
def folder(store, request):
    return location.locate(url_of(store, request.node.name))


def tops(folder):
    return sorted({name.partition("/")[0] for name in location.file_sizes(folder)})


def saved(folder, *steps, **options):
    with checkpointer(folder, **options) as run:
        for step in steps:
            run.save(step, make_state((4, 2), seed=step), meta=META, wait=True)
        return run.steps()


def assert_restored(folder, step):
    restored = restore(folder, abstract(make_state((2, 1)), (2, 1)), step)
    assert_same_bits(restored, make_state((1, 1), seed=step))


def test_what_was_saved_is_restored_and_old_ones_are_removed(folder):
    assert saved(folder, 10, 20, 30, keep=2) == [20, 30]
    assert tops(folder) == ["20", "30"]
    with checkpointer(folder) as run:
        found, words = run.newest_intact()
    assert (found.step, found.meta, words) == (30, META, [])
    assert_restored(folder, 30)


@pytest.mark.parametrize("name", ["", "a b/%41?#[y]+é"])
def test_a_url_is_a_bucket_or_any_name_in_it(store, name):
    folder = location.locate(url_of(store, name))
    assert saved(folder, 10, 20, keep=1) == [20]
    assert_restored(folder, 20)


def test_a_save_is_complete_with_its_manifest_and_not_before(folder, monkeypatch):
    seen, real = [], manifest.write_durably

    def watched(path, text):
        if path.name == manifest.MANIFEST:
            seen.append((tops(folder), complete_steps(folder)))
        real(path, text)

    monkeypatch.setattr(manifest, "write_durably", watched)
    assert saved(folder, 1, 2) == [1, 2]
    assert seen == [(["1"], []), (["1", "2"], [1])]


def test_what_killed_saves_and_removals_leave_is_removed_and_nothing_else(folder):
    saved(folder, 10, 20, 30)
    (folder / "20" / "manifest.json").unlink()  # the first act of a removal, the last of a save
    (folder / "40" / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "2024" / "photo.jpg").write_text("somebody's")
    assert newest_checkpoint(folder).step == 30
    with checkpointer(folder) as run:
        assert run.steps() == [10, 30]
        with pytest.raises(CheckpointError, match="step 2024 was not saved: a damaged one is in"):
            run.save(2024, make_state((4, 2)), meta=META)
    assert tops(folder) == ["10", "2024", "30"]


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_a_damaged_newest_is_marked_and_its_step_saved_again(folder, damage):
    saved(folder, 10, 20)
    path = damage(folder / "20")
    with checkpointer(folder) as run:
        step, words = newest(run)
        assert step == 10
        assert f"{path} " in words[0]
        assert manifest.ASIDE in words[0]
        assert run.steps() == [10]
        assert_restored(folder, 10)
    with checkpointer(folder) as run:  # a rerun leaves the marked one where it is
        assert (folder / "20" / manifest.ASIDE).exists()
        assert newest(run) == (10, [])
        run.save(20, make_state((4, 2), seed=20), meta=META)
    with checkpointer(folder) as run:
        assert newest(run) == (20, [])
        assert_restored(folder, 20)
    assert not (folder / "20" / manifest.ASIDE).exists()


def test_two_runs_cannot_share_a_url(folder, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    assert claim(folder, one) is None
    assert claim(folder, one) is None
    with refused(f"is of the run in {one} ", f"delete {folder}/{OWNER}"):
        claim(folder, other)
    check_owner(folder, one)
    (one / ".run_id").unlink()  # a new machine, on which the same path is empty
    assert "taken over" in claim(folder, one)
    (one / ".run_id").write_text("of the old machine")
    state = {"x": jax.numpy.ones(3)}
    with checkpointer(folder) as theirs:
        theirs.save(1, state, meta={})
    with checkpointer(folder, check_owner=lambda: check_owner(folder, one)) as run:
        with pytest.raises(CheckpointError, match="taken over by the run"):
            run.save(2, state, meta={})
        with pytest.raises(TransientError, match=r"after step 0 .* was taken over by the run"):
            run.remove_after(0)
        assert run.steps() == [1]
    (folder / OWNER).unlink()  # with the bucket, for example
    with pytest.raises(OSError, match=f"{OWNER} is gone"):
        check_owner(folder, one)


def test_keys_of_a_profile_are_renewed_and_expired_ones_cost_a_checkpoint(tmp_path, monkeypatch):
    port, keys, config = free_port(), tmp_path / "keys.json", tmp_path / "config"
    for name, value in (environment(port) | {"AWS_CONFIG_FILE": str(config)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    config.write_text(f"[profile mine]\ncredential_process = cat {keys}\n")

    def issue(key):
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 8))  # asked for anew
        found = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": "x", "Expiration": until}
        keys.write_text(json.dumps(found))

    state = {"x": jax.numpy.ones(3)}
    issue("key")
    with running("s3", port), checkpointer(location.locate("s3://bucket/keys")) as run:
        run.save(1, state, meta={}, wait=True)
        issue("expired")
        with pytest.raises(CheckpointError, match=r"step 2 was not saved: ExpiredToken"):
            run.save(2, state, meta={}, wait=True)
        issue("key")
        run.save(2, state, meta={}, wait=True)
        assert run.steps() == [1, 2]


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_store_that_goes_away_in_a_save_costs_that_checkpoint(tmp_path, kind, monkeypatch):
    need_package(kind)
    port, hold = free_port(), tmp_path / "hold"
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)
    shortly = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"}
    monkeypatch.setattr(object_stores, "RETRIES", shortly)
    folder, state = location.locate(url_of(kind, "run")), make_state((4, 2))
    with running(kind, port, hold):
        run = checkpointer(folder)
        run.save(1, state, meta=META, wait=True)
        verified, _ = run.newest_intact()
        hold.write_text("run/2/meta.json")
        run.save(2, state, meta=META)
        while not hold.with_suffix(".held").exists():
            time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: .*earlier ones cannot be"):
        run.wait()
    with pytest.raises(CheckpointError, match=r"step 3 was not saved: .*ould not connect"):
        run.save(3, state, meta=META, wait=True)
    assert "cannot be read now" in previous_checkpoint(run)
    wanted = abstract(state, (4, 2))
    gone = r"cannot .*: .*ould not connect.*check the bucket's name"
    for look in (run.steps, run.newest_intact, run.begin, lambda: restore_state(verified, wanted)):
        with pytest.raises(TransientError, match=gone):
            look()
    with running(kind, port):  # another one, which is empty
        run.save(4, state, meta=META, wait=True)
        assert run.steps() == [4]
        run.close()


def test_mistakes_are_one_message(store, tmp_path, monkeypatch):
    url = url_of(store, "run")
    nowhere = url.replace(BUCKET, "no-such-bucket")
    with refused("cannot be used: ", "check the bucket's name", "credentials"):
        claim(location.locate(nowhere), tmp_path)
    with refused(f"{nowhere} cannot be reached", "check the bucket's name", "credentials"):
        open_weights(nowhere)
    with refused(f"{url}: there is no checkpoint"):
        open_weights(url)
    with refused("not at ftp://"):
        open_weights("ftp://host/run")
    with refused("s3://: there is no bucket in it; write s3://BUCKET/NAME"):
        location.locate("s3://")
    with refused("cannot be used: ", "Invalid", 'bucket name: "x"'):
        claim(location.locate(url.replace(BUCKET, "x")), tmp_path)
    if store == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
        with refused("cannot be used: InvalidAccessKeyId", "AWS_SECRET_ACCESS_KEY"):
            claim(location.locate("s3://not-opened-yet/run"), tmp_path)


def test_two_processes_save_one_checkpoint_and_agree_on_damage(folder):
    seen = run_both(folder)
    assert [steps for _, steps in seen["saves"]] == [[1], [1, 2], [1, 2, 3], [2, 3, 4]]
    assert {how for how, _ in seen["saves"]} == {"saved"}
    assert seen["flipped"] == [3, 2, 3.0]
    assert seen["again"] == ["saved", [2, 3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_run_killed_in_a_save_resumes_bit_by_bit(tmp_path, kind):
    """Started from the shell; a save is held up, and the run killed in it."""
    need_package(kind)
    prepared, port, hold = unpack_data(tmp_path / "data"), free_port(), tmp_path / "hold"
    environ, url = os.environ | environment(port), url_of(kind, "run")
    here, there = tmp_path / "here", tmp_path / "there"
    keys = {"train.steps": 12, "train.log_every": 1, "train.eval_every": 6}

    def finished(command):
        done = warm.run(command, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done

    finished(train_command(prepared, here, keys))
    elsewhere = train_command(prepared, there, keys | {"checkpoint.directory": url})
    with running(kind, port, hold):
        hold.write_text("run/8/meta.json")
        with warm.Popen(elsewhere, env=environ, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 240
            while not hold.with_suffix(".held").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
        hold.unlink()
        text = finished(elsewhere).stderr
        assert "from step 4" in text
        assert f"Checkpoint {url}/12" in text
        assert logged(there) == logged(here)
        flags = [f"--data={prepared}", "--checkpoint"]
        texts = [shell("evaluate", *flags, str(at), env=environ).stdout for at in (url, there)]
        scores = [json.loads(text.splitlines()[-1]) for text in texts]
        assert scores[0]["loss"] == scores[1]["loss"]
