"""Find the splits that a folder declares: in the files of `datasets`, a README, or file names.

Source: the library `datasets` 5.2 (`save_to_disk`, `data_files.py`) and the hub's `configs:`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, listed

# The names of splits that are known, in the words of files and folders.
KNOWN = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
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

    config: its name; empty: the only one. Raises UserError where one has to be chosen.
    """
    configs = _readme_configs(folder)
    if not config and len(configs) < 2:
        config = next(iter(configs), "")
    if config not in configs:
        if not config and not configs:
            return None
        raise UserError(
            f"{folder}: its README.md declares the configs {listed(list(configs), most=20) or '-'};"
            f" choose one with {folder}:config=NAME"
        )
    declared = configs[config]
    if not isinstance(declared, list) or not isinstance(declared[0], dict):
        declared = [{"path": declared}]
    splits: Splits = {}
    for each in declared:
        paths = each.get("path", ())
        for pattern in [paths] if isinstance(paths, str) else paths:
            found = sorted(file for file in folder.glob(str(pattern)) if file.is_file())
            if not found:
                raise UserError(f"{folder}: no file matches {pattern} of its README.md")
            splits.setdefault(str(each.get("split", "train")), []).extend(found)
    return splits


def _readme_configs(folder: Path) -> dict[str, Any]:
    """Return the files that each config in a README's front matter declares."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    import yaml

    try:
        found = _FRONT_MATTER.match(readme.read_text("utf-8"))
        matter = (yaml.safe_load(found[1]) if found else None) or {}
        configs = matter.get("configs") or ()
        return {str(c["config_name"]): c["data_files"] for c in configs if c.get("data_files")}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, AttributeError) as error:
        raise UserError(f"{readme}: its front matter cannot be read: {error}") from error


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
    Of a `.txt` only the last word counts: others are of its title.
    """
    shard = _SHARD.match(name)
    if shard and re.split(r"[-._]", shard[1].lower())[0] in KNOWN:
        return shard[1].lower()
    stem, _, suffix = re.sub(r"\.(gz|zst)$", "", name.lower()).rpartition(".")
    words = [word for word in re.split(r"[-._ \d]+", stem) if word not in ("", "of")]
    return next((w for w in (words[-1:] if suffix == "txt" else words) if w in KNOWN), "")
