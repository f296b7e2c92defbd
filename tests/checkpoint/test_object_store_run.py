"""A run whose checkpoints are at a URL, started from the shell: killed in a save, and resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from object_store import BUCKET, environment, free_port, need_packages, running
from write_old_run import unpack_data

CONFIG = Path(__file__).parents[1] / "training" / "tiny_run.py"
FIELDS = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "eval_loss")
HELD_WITHIN_S = 240


def train(prepared, workdir, *overrides):
    keys = ("train.steps=12", "train.log_every=1", "train.eval_every=6", *overrides)
    found = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{prepared}"]
    return [*found, f"--workdir={workdir}", *(f"--config.{key}" for key in keys)]


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(line).items() if k in FIELDS} for line in lines]
    return sorted(kept, key=lambda row: (row["step"], "eval_loss" in row))


@pytest.mark.slow
def test_a_run_killed_in_a_save_resumes_bit_by_bit(tmp_path):
    need_packages()
    prepared, port, hold = unpack_data(tmp_path / "data"), free_port(), tmp_path / "hold"
    environ = os.environ | environment(port)

    def said(command):
        done = warm.run(command, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done

    here, there, url = tmp_path / "here", tmp_path / "there", f"gs://{BUCKET}/run"
    elsewhere = train(prepared, there, f"checkpoint.directory={url}")
    said(train(prepared, here))
    with running(port, hold):
        hold.write_text("run/8/meta.json")
        with warm.Popen(elsewhere, env=environ, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + HELD_WITHIN_S
            while not hold.with_suffix(".held").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
        hold.unlink()
        text = said(elsewhere).stderr
        assert "from step 4" in text
        assert f"Checkpoint {url}/12" in text
        assert rows(there) == rows(here)
        evaluate = [sys.executable, "-m", "llamajax.evaluate", f"--data={prepared}"]
        texts = [said([*evaluate, f"--checkpoint={where}"]).stdout for where in (url, there)]
        scores = [json.loads(text.splitlines()[-1]) for text in texts]
        assert scores[0]["loss"] == scores[1]["loss"]
