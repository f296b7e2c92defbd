"""Find the splits that a folder declares: in the files of `datasets`, a README, or file names.

Source: the library `datasets` 5.2 (`save_to_disk`, `data_files.py`) and the hub's `configs:`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, listed
from llamajax.files import read_json_object

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
    if (listing := folder / "dataset_dict.json").is_file():
        names = read_json_object(listing).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{listing}: its splits are no list of names; save it again")
        return {name: _saved_files(folder / name)[0] for name in names}
    if not _is_saved(folder):
        return None
    files, name = _saved_files(folder)
    return {name if name in KNOWN else "": files}


def without_caches(files: Sequence[Path]) -> list[Path]:
    """Leave out what `datasets` cached beside the files of a saved set."""
    folders = {file.parent for file in files}
    saved = {folder: {*_saved_files(folder)[0]} for folder in folders if _is_saved(folder)}
    return [file for file in files if file in saved.get(file.parent, (file,))]


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_files(folder: Path) -> tuple[list[Path], str]:
    """Return the files of one saved split, and its name; empty if it was saved without one."""
    state = read_json_object(folder / "state.json")
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
    return files, str(state.get("_split") or "")


def readme_splits(folder: Path, config: str) -> Splits | None:
    """Return the files of a config that the README of a hub folder declares; None without any.

    config: its name; empty: the only one, or else the default, as `datasets` chooses. A pattern
    that no file matches stands for itself. Raises UserError where one has to be chosen.
    """
    import yaml

    readme, splits = folder / "README.md", {}
    try:
        found = _FRONT_MATTER.match(readme.read_text("utf-8")) if readme.is_file() else None
        matter = (yaml.safe_load(found[1]) if found else None) or {}
        configs = {str(c["config_name"]): c for c in matter.get("configs") or ()}
        configs = {name: c for name, c in configs.items() if c.get("data_files")}
        names = [config] if config else list(configs)
        if len(names) > 1:
            names = [name for name in names if name == "default" or configs[name].get("default")]
        is_one = len(names) == 1 and names[0] in configs
        for split, pattern in _patterns(configs[names[0]]["data_files"]) if is_one else ():
            files = sorted(file for file in folder.glob(pattern) if file.is_file())
            splits.setdefault(split, {}).update(dict.fromkeys(files or [folder / pattern]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{readme}: its front matter cannot be read: {error}") from error
    if not is_one and (config or configs):
        raise UserError(
            f"{folder}: its README.md declares the configs {listed(list(configs), most=20) or '-'};"
            f" choose one with {folder}:config=NAME"
        )
    return {split: list(files) for split, files in splits.items()} or None


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Yield the split of each pattern that a config declares. Raises TypeError for other forms."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    if len({isinstance(each, dict) for each in entries}) > 1:
        raise TypeError("data_files: some have a split and some have none")
    for each in entries:
        entry = each if isinstance(each, dict) else {"path": each}
        paths = entry.get("path")
        for pattern in paths if isinstance(paths, list) else [paths]:
            if not isinstance(pattern, str) or not pattern or pattern.startswith("/"):
                raise TypeError(f"data_files: {pattern!r} is no path within the folder")
            yield str(entry.get("split", "train")), pattern


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
