"""Find the splits that a folder declares: in the files of `datasets`, a README, or file names.

Source: the library `datasets` 5.2 (`save_to_disk`, `data_files.py`) and the hub's `configs:`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, did_you_mean, listed, nearest

# The names of splits that are known, in the words of files and folders.
KNOWN = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NUMBERS = re.compile(r"[-._]?\d+(-of-\d+.*)?$")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)

# The files of each split by the name that is declared for it; "" if none is.
Splits = dict[str, list[Path]]


def saved_splits(folder: Path) -> Splits | None:
    """Return what `save_to_disk` wrote into a folder; None if it is not of that kind.

    `state.json` lists the files: others in the folder are caches. Raises UserError for a missing
    file.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits") or ()
        return {name: _saved_files(folder / name)[0] for name in names}
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    files, name = _saved_files(folder)
    return {name if name in KNOWN else "": files}


def _saved_files(folder: Path) -> tuple[list[Path], str | None]:
    """Return the files of one saved split, and its name if it was saved with one."""
    state = _read_json(folder / "state.json")
    try:
        files = [folder / each["filename"] for each in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'state.json'}: lists no _data_files; save it again") from None
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: its rows are chosen by a file of indices, as an early version of datasets "
            "saved them; save it again: load_from_disk(IN).flatten_indices().save_to_disk(OUT)"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder}: lacks {listed(missing, most=10)}, which state.json lists")
    return files, state.get("_split")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def readme_splits(folder: Path, config: str) -> Splits | None:
    """Return the files of a config that the README of a hub folder declares; None without any.

    config: its name; empty: the only one, or the one marked as the default.
    """
    configs = {c.get("config_name", "default"): c for c in _readme_configs(folder)}
    if not configs:
        if config:
            raise UserError(f"{folder}: no README.md there declares configs, so no {config!r}")
        return None
    defaults = [name for name, c in configs.items() if c.get("default")]
    if not config and len(configs) > 1 and len(defaults) != 1 and "default" not in configs:
        raise UserError(
            f"{folder}: its README.md declares the configs {listed(list(configs), most=20)}; choose"
            f" one with {folder}:config=NAME"
        )
    config = config or (next(iter(configs)) if len(configs) == 1 else (*defaults, "default")[0])
    if config not in configs:
        raise UserError(
            f"{folder}: its README.md declares no config {config!r} but"
            f" {listed(list(configs), most=20)}{did_you_mean(nearest(config, configs))}"
        )
    declared = configs[config]["data_files"]
    if not isinstance(declared, list) or not all(isinstance(d, dict) for d in declared):
        declared = [{"split": "train", "path": declared}]
    splits: Splits = {}
    for each in declared:
        paths = each.get("path", ())
        for pattern in [paths] if isinstance(paths, str) else paths:
            found = sorted(file for file in folder.glob(str(pattern)) if file.is_file())
            if not found:
                raise UserError(f"{folder}: no file matches {pattern} of its README.md")
            splits.setdefault(str(each.get("split", "train")), []).extend(found)
    return splits


def _readme_configs(folder: Path) -> list[dict[str, Any]]:
    """Return the configs in a README's front matter that declare files."""
    readme = folder / "README.md"
    try:
        found = _FRONT_MATTER.match(readme.read_text("utf-8")) if readme.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read: {error}") from error
    if not found or "configs:" not in found[1]:
        return []
    import yaml

    try:
        configs = yaml.safe_load(found[1])["configs"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{readme}: its front matter cannot be read: {error}") from error
    return [c for c in configs or () if isinstance(c, dict) and c.get("data_files")]


def named_splits(folder: Path, files: Iterable[Path]) -> Splits:
    """Return the files by the split that their folder or name speaks of.

    As `train/x.parquet`, `data/validation-00000-of-00002.parquet`, `wiki.test.tokens`.
    """
    splits: Splits = {}
    for file in files:
        *folders, name = file.relative_to(folder).parts
        words = [part.lower() for part in folders if part.lower() in KNOWN]
        splits.setdefault((words or [_word_of(name)])[0], []).append(file)
    return splits


def _word_of(name: str) -> str:
    """Return the split in a file's name; empty if there is none.

    A shard's name is that of its split, as `train_sft-00000-of-00003`, if a known word begins it.
    """
    shard = _SHARD.match(name)
    if shard and re.split(r"[-._]", shard[1].lower())[0] in KNOWN:
        return shard[1].lower()
    stem = name.lower()
    for suffix in (".gz", ".zst"):
        stem = stem.removesuffix(suffix)
    word = re.split(r"[-._]", _NUMBERS.sub("", stem.rpartition(".")[0]))[-1]
    return word if word in KNOWN else ""
