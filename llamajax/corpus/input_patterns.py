"""Find the files of --input: paths, globs and folders, each with options of its own."""

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamajax.corpus.dataset_splits import (
    KNOWN,
    Splits,
    named_splits,
    readme_splits,
    saved_splits,
)
from llamajax.corpus.input_files import COMPRESSIONS, FORMATS, format_of
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError, did_you_mean, listed, nearest, say

# Flags that an input may have for itself, and the kinds of files that have a use for each.
_OWN_FLAGS = {
    "text_key": (".jsonl", ".parquet", ".arrow"),
    "clean": FORMATS,
    "document_separator": (".txt",),
}
_OWN = (*_OWN_FLAGS, "split", "into", "config")
_CHOICES = {"clean": ("none", "wikitext"), "into": ("train", "validation")}
_OPTION = re.compile(r":(?=[A-Za-z_]+=)")
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class InputPattern:
    """One input as given: a path or glob, and its own options; the splits that are not read."""

    path: str
    given: dict[str, str]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read. options: those of its input. split: where its input declares it to go."""

    path: Path
    options: PrepareOptions
    split: str | None = None
    pattern: InputPattern | None = None

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
        pattern, own = _parse(text, options)
        splits = _splits_of(pattern)
        chosen = _choose(pattern, splits)
        left_out = {name: len(files) for name, files in splits.items() if name not in chosen}
        pattern = dataclasses.replace(pattern, left_out=left_out)
        if len(splits) > 1:
            read = ", ".join(f"{n or 'other files'} ({len(splits[n])})" for n in chosen)
            left = ", ".join(f"{name} ({count})" for name, count in left_out.items())
            say(
                f"note: --input: {pattern.path}: files of these splits are read: {read}"
                + (f"; left out: {left}" if left else "")
            )
        for split in chosen:
            for file in splits[split]:
                if not format_of(file):
                    raise UserError(
                        f"--input: {file}: unknown kind of file; known are {', '.join(FORMATS)},"
                        f" each also with {' or '.join(COMPRESSIONS)}"
                    )
                new = InputFile(file, own, chosen[split], pattern)
                old = found.setdefault(file.resolve(), new)
                if (old.options, old.split) != (new.options, new.split):
                    raise UserError(
                        f"--input: {file} is in two inputs with different options:"
                        f" {old.pattern.path} and {pattern.path}; name it in one of them"
                    )
        kinds = {format_of(file) for split in chosen for file in splits[split]}
        for name in _OWN_FLAGS:
            if name in pattern.given and not kinds & set(_OWN_FLAGS[name]):
                kinds = " and ".join(_OWN_FLAGS[name])
                raise UserError(f"--input: {text}: {name} is for {kinds} files")
    if not found:
        raise UserError("--input is empty; name a file, a directory or a glob")
    return list(found.values())


def declares_validation(files: Sequence[InputFile]) -> bool:
    """Return whether an input says what the validation split is, so that nothing is held out."""
    return any(file.split == "validation" for file in files)


def record_of(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Return each input for the manifest, with its files by split; nothing for plain ones."""
    counts: dict[int, Counter[str]] = {}
    patterns = {id(file.pattern): file.pattern for file in files}
    for file in files:
        counts.setdefault(id(file.pattern), Counter())[file.split or ""] += 1
    if not any(p.given or p.left_out or set(counts[i]) - {""} for i, p in patterns.items()):
        return []
    return [
        {"path": pattern.path, **pattern.given, "files": counts[number].total()}
        | {f"{split}_files": n for split, n in counts[number].items() if split}
        | ({"left_out_files": pattern.left_out} if pattern.left_out else {})
        for number, pattern in patterns.items()
    ]


def _parse(text: str, options: PrepareOptions) -> tuple[InputPattern, PrepareOptions]:
    """Parse `PATH:KEY=VALUE:...`; return it with the options of its files."""
    path, *pairs = [text] if Path(text.strip()).exists() else _OPTION.split(text)
    pattern = InputPattern(path.strip(), dict(pair.split("=", 1) for pair in pairs))
    for name, value in pattern.given.items():
        where = f"--input: {pattern.path}:{name}={value}"
        if name in ("format", "chat_template", "on_error"):
            raise UserError(
                f"{where}: --{name} is one for all inputs; prepare the others into a directory of "
                "their own and train on both: --config.data.path=data/a,data/b"
            )
        if name not in _OWN:
            hint = did_you_mean(nearest(name, _OWN)) or f"; an input may have {', '.join(_OWN)}"
            raise UserError(f"{where}: unknown{hint}")
        if value not in _CHOICES.get(name, (value,)):
            raise UserError(f"{where}: expected {' | '.join(_CHOICES[name])}")
    flags = {name: value for name, value in pattern.given.items() if name in _OWN_FLAGS}
    own = dataclasses.replace(options, **flags)
    if flags and (problems := list(own.problems())):
        raise UserError(f"--input: {text}: {problems[0]}")
    return pattern, own


def _splits_of(pattern: InputPattern) -> Splits:
    """Return the files of an input by the split that they are declared to be of."""
    path, config = Path(pattern.path), pattern.given.get("config", "")
    if path.is_dir():
        splits = saved_splits(path) or readme_splits(path, config)
        if splits is None:
            files, others = _files_in(path)
            _note_left_out(pattern.path, others)
            splits = named_splits(path, files)
        if not any(splits.values()):
            kinds = ", ".join(FORMATS)
            raise UserError(f"--input: no {kinds} files in directory {pattern.path}")
        return splits
    if config:
        raise UserError(f"--input: {pattern.path}:config={config}: config is for directories")
    if path.exists():
        return {"": [path]}
    matched = sorted(Path(f) for f in glob.glob(pattern.path, recursive=True))
    files = [f for f in matched if f.is_file()]
    known = {*files, *(folder for f in files for folder in f.parents)}
    _note_left_out(pattern.path, [str(f) for f in matched if f not in known])
    if not files:
        kind = "no file matches" if glob.has_magic(pattern.path) else "no such file:"
        raise UserError(f"--input: {kind} {pattern.path}")
    splits = named_splits(Path(os.path.commonpath([f.parent for f in files])), files)
    return splits if len(splits) > 1 else {"": files}  # a glob of one split is meant as it is


def _choose(pattern: InputPattern, splits: Splits) -> dict[str, str | None]:
    """Return the splits that are read, each with where it goes; None: that is not declared."""
    wanted, into = pattern.given.get("split", ""), pattern.given.get("into")
    kinds = {name: KNOWN.get(name, name) for name in splits}
    declared = [name for name in splits if name]
    names = f"{pattern.path} declares the splits {listed(declared, most=20)}"
    if wanted not in ("", "all") and wanted not in splits:
        has = names if declared else f"{pattern.path} declares none"
        hint = did_you_mean(nearest(wanted, declared))
        raise UserError(f"--input: no split {wanted!r}: {has}{hint}")
    if wanted == "all" or set(kinds.values()) <= {"", "train"}:
        return dict.fromkeys(splits, into)
    if wanted:
        return {wanted: into}
    if into or "" in splits or "train" not in kinds.values():
        more = f", but not of {listed(splits[''], most=3)}" if "" in splits else ""
        raise UserError(
            f"--input: {names}{more}; say what to read: {pattern.path}:split=NAME, or split=all"
        )
    read = {name: kind for name, kind in kinds.items() if kind in ("train", "validation")}
    return read if "validation" in read.values() else dict.fromkeys(read)


def _note_left_out(pattern: str, names: Sequence[str]) -> None:
    if names:
        is_json = any(name.lower().endswith(".json") for name in names)
        say(
            f"note: --input: {len(names)} left out of {pattern}, not of a kind that is read from "
            f"there: {', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}"
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
            else:
                others.append(str(file.relative_to(directory)))
    return sorted(files), sorted(others)
