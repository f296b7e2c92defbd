"""A sink for Weights & Biases. WANDB_MODE, WANDB_PROJECT and others choose as they do elsewhere."""

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import say
from llamajax.files import write_file
from llamajax.monitoring.jsonl import read_object

_FINISH_WITHIN_S = 10


class WeightsAndBiases:
    """Logs to one run of Weights & Biases, however often the run here is resumed.

    Its id is kept in `workdir/wandb/llamajax.json`. Charts have `step` as their x axis. W&B's own
    step must never fall, and training's does at a resume or a rollback, so that it counts the
    milliseconds since the run began.
    """

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]):
        import wandb

        file = workdir / "wandb" / "llamajax.json"
        known = read_object(file)
        if not known:
            known = {"id": uuid.uuid4().hex[:12], "began_s": time.time()}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(known) + "\n", durable=True)
        self._began_s, self._step = known["began_s"], 0
        settings = wandb.Settings(
            console="off",  # standard error is copied to train.log
            silent=True,
            login_timeout=1,  # no question on the terminal
            finish_timeout=_FINISH_WITHIN_S,
        )
        self._run = wandb.init(
            id=known["id"],
            resume="allow",
            name=config.get("train", {}).get("name") or workdir.absolute().name,
            dir=str(workdir),
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:
            say(f"wandb    {self._run.url}")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log a row, a history entry of its own."""
        self._log({"step": step, **values})

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Log a text."""
        self._log({"step": step, tag: text})

    def _log(self, values: Mapping[str, object]) -> None:
        self._step = max(self._step + 1, int(1000 * (time.time() - self._began_s)))
        self._run.log(values, step=self._step, commit=True)

    def close(self) -> None:
        """Finish this process's part of the run."""
        self._run.finish()
