"""Find the files of --input: paths, globs and folders, each with options of its own."""

import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamajax.corpus.dataset_splits import (
    KNOWN,
    Splits,
    named_splits,
    readme_splits,
    saved_splits,
    without_caches,
)
from llamajax.corpus.input_files import COMPRESSIONS, FORMATS, TOKEN_FORMATS, format_of
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError, did_you_mean, listed, nearest, say

# Flags that an input may have for itself, and what only an input has.
_OWN_FLAGS = ("text_key", "clean", "document_separator")
_OWN = (*_OWN_FLAGS, "split", "into", "config")
_CHOICES = {"clean": ("none", "wikitext"), "into": ("train", "validation")}
_OPTION = re.compile(r":(?=[A-Za-z_]+=)")
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read, with the options of its input.

    split: where its input declares it to go; None: validation is held out. record: its input as the
    manifest has it, the same object for all files of an input.
    """

    path: Path
    options: PrepareOptions
    split: str | None
    record: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def facts(self) -> list[Any]:
        """What decides the tokens of the file, besides its content and flags for all files."""
        own = [getattr(self.options, name) for name in _OWN_FLAGS]
        return [self.path.name, self.size, self.split, *own]


def find_inputs(options: PrepareOptions) -> list[InputFile]:
    """List the files of all inputs, each once; those of an input are sorted.

    A directory means all files of a known kind in it, at any depth, or those of the splits that it
    declares. Raises UserError for an input without files and for a file of an unknown kind.
    """
    found: dict[Path, InputFile] = {}
    for text in (p for p in options.input.split(",") if p.strip()):
        path, given, own = _parse(text, options)
        splits = _splits_of(path, given)
        chosen = _choose(path, given, splits)
        record: dict[str, Any] = {"path": path, **given}
        files = [(file, into) for split, into in chosen.items() for file in splits[split]]
        if lost := [str(file) for file, _ in files if not file.exists()]:
            raise UserError(
                f"--input: no file matches {listed(lost, most=10)}, which {path}/README.md"
                f" declares; download it, or choose another split: {path}:split=NAME"
            )
        if len(splits) > 1:
            left = {name: sum(map(Path.exists, files)) for name, files in splits.items()}
            read = {name: left.pop(name) for name in chosen}
            record |= {"files_read": read, "files_left_out": left}
            more = f"; left out: {_listed(left)}" if left else ""
            say(f"note: --input: {path}: files of these splits are read: {_listed(read)}{more}")
        for file, into in files:
            if not format_of(file):
                raise UserError(
                    f"--input: {file}: unknown kind of file; known are {', '.join(FORMATS)},"
                    f" each also with {' or '.join(COMPRESSIONS)}"
                )
            new = InputFile(file, own, into, record)
            old = found.setdefault(file.resolve(), new)
            if (old.options, old.split) != (new.options, new.split):
                raise UserError(
                    f"--input: {file} is in two splits of {path}; choose: {path}:split=NAME"
                    if old.record is record
                    else f"--input: {file} is in two inputs with different options:"
                    f" {old.record['path']} and {path}; name it in one of them"
                )
        if given.get("document_separator") and all(format_of(f) != ".txt" for f, _ in files):
            raise UserError(f"--input: {text}: document_separator is for .txt files")
    if not found:
        raise UserError("--input is empty; name a file, a directory or a glob")
    return list(found.values())


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or 'other files'} ({count})" for name, count in counts.items())


def declares_validation(files: Sequence[InputFile]) -> bool:
    """Return whether an input says what the validation split is, so that nothing is held out."""
    return any(file.split == "validation" for file in files)


def records_of(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Return each input for the manifest; none if no input has options or splits."""
    records = list({id(file.record): file.record for file in files}.values())
    return records if any(len(record) > 1 for record in records) else []


def _parse(text: str, options: PrepareOptions) -> tuple[str, dict[str, str], PrepareOptions]:
    """Parse `PATH:KEY=VALUE:...`; return its path and options, and all flags of its files."""
    path, *pairs = [text] if Path(text.strip()).exists() else _OPTION.split(text)
    path, given = path.strip(), {}
    for name, value in (pair.split("=", 1) for pair in pairs):
        where = f"--input: {path}:{name}={value}"
        if name in given:
            raise UserError(f"{where}: {name} is given twice")
        if name in ("format", "chat_template", "on_error"):
            raise UserError(
                f"{where}: --{name} is one for all inputs; prepare the others into a directory of "
                "their own and train on both: --config.data.path=data/a,data/b"
            )
        if name not in _OWN:
            hint = did_you_mean(nearest(name, _OWN)) or f"; an input may have {', '.join(_OWN)}"
            raise UserError(
                f"{where}: unknown{hint} (where the path has the colon, write ? for it)"
            )
        if not value and name != "document_separator":
            raise UserError(f"{where} has no value; give one, or leave :{name}= out")
        if value not in _CHOICES.get(name, (value,)):
            raise UserError(f"{where}: expected {' | '.join(_CHOICES[name])}")
        given[name] = value
    own = dataclasses.replace(options, **{n: v for n, v in given.items() if n in _OWN_FLAGS})
    if given and (problems := list(own.problems())):
        raise UserError(f"--input: {text}: {problems[0]}")
    return path, given, own


def _splits_of(name: str, given: dict[str, str]) -> Splits:
    """Return the files of an input by the split that they are declared to be of."""
    path, config = Path(name), given.get("config", "")
    if path.is_dir():
        splits = saved_splits(path)
        if splits is not None and not any(splits.values()):
            raise UserError(f"--input: {name}: the dataset that was saved there has no rows")
        splits = splits or readme_splits(path, config)
        if splits is None:
            files, others = _files_in(path)
            _note_left_out(name, others)
            splits = named_splits(path, files)
        if not splits:
            raise UserError(f"--input: no {', '.join(FORMATS)} files in directory {name}")
        return splits
    if config:
        raise UserError(f"--input: {name}:config={config}: config is for directories")
    if _is_index(Path(f"{path}.idx")):  # as Megatron-LM names it
        path = Path(f"{path}.idx")
    if path.exists():
        return {"": [path.with_suffix(".bin") if _is_index(path) else path]}
    matched = sorted(Path(f) for f in glob.glob(name, recursive=True))
    matched = [file for file in matched if not _is_index(file)]
    files = without_caches([f for f in matched if f.is_file()])
    known = {*files, *(folder for f in files for folder in f.parents)}
    _note_left_out(name, [str(f) for f in matched if f not in known])
    if not files:
        kind = "no file matches" if glob.has_magic(name) else "no such file:"
        raise UserError(f"--input: {kind} {name}")
    splits = named_splits(Path(os.path.commonpath([f.parent for f in files])), files)
    return splits if len(splits) > 1 else {"": files}  # a glob of one split is meant as it is


def _choose(name: str, given: dict[str, str], splits: Splits) -> dict[str, str | None]:
    """Return the splits that are read, each with where it goes; None: that is not declared."""
    wanted, into = given.get("split", ""), given.get("into")
    kinds = {split: KNOWN.get(split, split) for split in splits}
    declared = listed([split for split in splits if split], most=20)
    if wanted == "all" or (not wanted and set(kinds.values()) <= {"", "train"}):
        return dict.fromkeys(splits, into)
    if wanted in kinds and wanted:
        return {wanted: into}
    if wanted:
        hint = did_you_mean(nearest(wanted, kinds))
        raise UserError(f"--input: {name}:split={wanted}: it declares {declared or 'none'}{hint}")
    if into or "" in splits or "train" not in kinds.values():
        more = f", but not of {listed(splits[''], most=3)}" if "" in splits else ""
        raise UserError(
            f"--input: {name} declares the splits {declared}{more}; say what to read:"
            f" {name}:split=NAME, or split=all"
        )
    read = {split: kind for split, kind in kinds.items() if kind in ("train", "validation")}
    return read if "validation" in read.values() else dict.fromkeys(read)


def _note_left_out(pattern: str, names: Sequence[str]) -> None:
    if names:
        is_json = any(name.lower().endswith(".json") for name in names)
        say(
            f"note: --input: {len(names)} left out of {pattern}, not of a kind that is read from "
            f"there: {listed(names, most=_NAMED)}"
            + ("; name a .json file itself if it holds JSON lines" if is_json else "")
        )


def _files_in(directory: Path) -> tuple[list[Path], list[str]]:
    """List the files to read in a directory at any depth, sorted, and the names of the others.

    Follows symbolic links and ignores hidden files. Leaves out plain `.json`, which is rarely data.
    Raises UserError for a folder that cannot be listed.
    """
    files, others, seen = [], [], set()

    def refuse(error: OSError) -> None:
        raise UserError(f"--input: {error.filename}: cannot be listed: {error.strerror}") from error

    for folder, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        visible = [] if real in seen else [Path(folder, n) for n in names if not n.startswith(".")]
        seen.add(real)
        for file in visible:
            if file.is_file() and format_of(file) and file.suffix.lower() != ".json":
                files.append(file)
            elif not _is_index(file):
                others.append(str(file.relative_to(directory)))
    kept = without_caches(files)
    texts = [file for file in kept if format_of(file) not in TOKEN_FORMATS]
    kept = texts or kept  # beside texts, `.bin` may be anything
    others += [str(file.relative_to(directory)) for file in {*files}.difference(kept)]
    return sorted(kept), sorted(others)


def _is_index(file: Path) -> bool:
    """Return whether a file is the index beside a `.bin` of Megatron-LM."""
    return file.suffix == ".idx" and file.with_suffix(".bin").is_file()
