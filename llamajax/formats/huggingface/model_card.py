"""Write a model card: README.md with the header that the Hugging Face hub reads, and a run's facts.

Header: https://huggingface.co/docs/hub/model-cards. What is not known is left out, and the license
is the user's to state. A seal under the card tells whether somebody has edited it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.config.saved_config import record_of_step
from llamajax.config.schema import ModelConfig
from llamajax.models.counts import num_parameters
from llamajax.monitoring import load_metrics
from llamajax.monitoring.jsonl import read_object
from llamajax.monitoring.run_facts import RUN_FACTS

CARD = "README.md"
_PARTS = ("train", "data", "optim", "lora")
_SEAL = "\n<!-- Written by llamajax; replaced at the next export unless edited. {} -->\n"
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(/|$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """The run that made some weights.

    recorded: what checkpoints record (`config`, `data`, `base`). workdir: holds its rows and
    `run.json`, if it is here.
    """

    step: int
    recorded: Mapping[str, Any]
    workdir: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """The config at this step, with an empty object for each part that is not recorded."""
        config = record_of_step(self.recorded.get("config") or {}, self.step)
        return {part: {} for part in _PARTS} | dict(config)

    @property
    def base(self) -> str | None:
        """Path of the weights that it began with."""
        base = self.recorded.get("base") or {"path": self.config["train"].get("init_from")}
        return base["path"]


def hub_name(path: str | Path, given: str | None = None) -> tuple[str | None, str | None]:
    """Return name and revision on the hub of weights in a snapshot folder of its cache.

    given: `train.base_model`, which comes before what the path says. The `_name_or_path` of a
    config.json is often the model that these weights were made from, so it is not used.
    """
    found = _SNAPSHOT.search(str(Path(path).resolve()))
    if given or not found:
        return given, None
    return found[1].replace("--", "/"), found[2]


def model_card(
    model: ModelConfig,
    title: str,
    *,
    run: RunOrigin | None = None,
    average: str | None = None,
    is_peft: bool = False,
) -> bytes:
    """Return a card. average: of which checkpoints the weights are; is_peft: only adapters."""
    header = {
        "library_name": "peft" if is_peft else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "llamajax", *(["lora"] if is_peft else [])],
    }
    facts, config = {"parameters": f"{num_parameters(model):,}"}, {}
    if average:
        facts["average"] = f"{average}; losses are of the weights that were trained"
    if run is not None:
        config = run.config
        if run.base:
            name, _ = hub_name(run.base, config["train"].get("base_model"))
            header |= {"base_model": name} if name else {}
            parts = [part for part in Path(run.base).parts if not part.isdecimal()]
            facts["trained from"] = name or [part for part in parts if part != "checkpoints"][-1]
        facts |= _facts_of_run(run)
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items())]
    lines += ["# license: not stated; name yours here", "---", "", f"# {title}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())]
    if config:
        kept = {part: config[part] for part in _PARTS if config[part]}
        text = re.sub(r'(?<=[",=])[^",=\n]*/(?=[^",\n])', "", json.dumps(kept, indent=1))
        lines += ["", "Config (paths without their folders):", "", "```json", text, "```"]
    return _sealed(("\n".join(lines) + "\n").encode())


def _facts_of_run(run: RunOrigin) -> Iterator[tuple[str, str]]:
    """Yield names and values for the table; of rows, the last up to this step that has a value."""
    config = run.config
    yield "updates", f"{run.step:,}"
    if lora := config["lora"].get("rank"):
        yield "adapters", f"rank {lora} on {', '.join(config['lora']['targets'])}"
    rows = [row for row in load_metrics(run.workdir) if row["step"] <= run.step][::-1]
    if row := next((row for row in rows if {"tokens_seen", "loss"} <= row.keys()), {}):
        yield "tokens seen", f"{row['tokens_seen']:,} at step {row['step']:,}"
        yield "training loss", f"{row['loss']:.4f}"
    row = next((row for row in rows if "eval_loss" in row), {})
    for key in (key for key in row if key.startswith("eval_loss")):
        name = key.replace("eval_loss", "held-out loss").replace("/", ", ")
        yield name, f"{row[key]:.4f} at step {row['step']:,}"
    for split, content in (run.recorded.get("data") or {}).items():
        yield f"data, {split}", content
    if names := config["data"].get("path"):
        yield "data, folders", ", ".join(Path(name).name for name in names.split(","))
    if versions := read_object(run.workdir / RUN_FACTS).get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def edited_card(directory: Path) -> bytes | None:
    """Return the card in a directory; None for one that is as it was written here."""
    if not (directory / CARD).is_file():
        return None
    content = (directory / CARD).read_bytes()
    body = content.rpartition(_SEAL.partition("{")[0].encode())[0]
    return None if content == _sealed(body) else content


def _sealed(body: bytes) -> bytes:
    return body + _SEAL.format(hashlib.sha256(body).hexdigest()[:16]).encode()
