"""What makes a checkpoint complete: `manifest.json`, written last and committed by one rename.

An object store has no rename: there the manifest itself is the commit.

    checkpoints/STEP/state/**        the arrays, as Orbax writes them
    checkpoints/STEP/meta.json       data position, resolved config, tokenizer, data
    checkpoints/STEP/manifest.json   the arrays' names, shapes, dtypes; the files' sizes, CRC-32

A directory is a complete checkpoint when its name is a step number and every file of its manifest
is there with its size. The checksums are computed in the background while saving, and checked in
full once, before anything is restored. CRC-32 guards against disks, not against people: it reads
3 GB/s.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from llamajax.checkpoint import location
from llamajax.checkpoint.location import Location, is_remote
from llamajax.files import force_to_disk, free_name, write_file

MANIFEST = "manifest.json"
# In an object store: the manifest of a checkpoint that was found damaged.
ASIDE = "manifest.damaged.json"
META = "meta.json"
STATE = "state"
FORMAT = 1

_STEP = re.compile(r"0|[1-9]\d*")
# Orbax's suffix of a save in progress, ours of a removal in progress, and what a save tries first.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removing)|\.probe_\d+")
# What Orbax and we write in the directory of one checkpoint; with anything else it is not ours.
_OURS = {STATE, META, ASIDE, "_CHECKPOINT_METADATA", "commit_success.txt"}
# Bytes a read and threads. A store answers a request late, and then at the speed of the network.
_LOCAL_READS, _REMOTE_READS = (1 << 22, 4), (1 << 24, 8)


class DamagedError(Exception):
    """A checkpoint cannot be trusted: which file, and what is wrong with it."""

    def __init__(self, path: PurePath, problem: str):
        super().__init__(f"{path} {problem}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint: arrays as (dtype, shape) by name, files as (size, CRC-32).

    fingerprint: SHA-256 of `manifest.json`, which identifies the checkpoint.
    """

    step: int
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, tuple[int, int]]
    fingerprint: str


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read_files(
    directory: Location, names: Iterable[str], *, sync: bool = False
) -> dict[str, tuple[int, int]]:
    """Return size and CRC-32 of files by name; `sync` also forces them onto the disk."""
    num_bytes, threads = _REMOTE_READS if is_remote(directory) else _LOCAL_READS

    def read(name: str) -> tuple[str, tuple[int, int]]:
        size = crc = 0
        for chunk in location.read_chunks(directory / name, num_bytes):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        if sync:
            force_to_disk(directory / name)
        return name, (size, crc)

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(read, names))


def write_durably(path: Location, text: str) -> None:
    """Write a small file and force it onto the disk."""
    if is_remote(path):
        path.write_text(text)
    else:
        write_file(path, text, durable=True)


def seal(
    directory: Location, *, step: int, arrays: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Checksum all files of a finished save and write its manifest, the last file of all.

    `commit_success.txt` and `_CHECKPOINT_METADATA` at the top are Orbax's own notes about the save,
    still changing at this point and not needed to restore.
    """
    found = location.file_sizes(directory)
    names = [*sorted(name for name in found if name.startswith(f"{STATE}/")), META]
    files = _read_files(directory, names, sync=not is_remote(directory))
    body = {
        "format": FORMAT,
        "step": step,
        "arrays": {name: [dtype, list(shape)] for name, (dtype, shape) in arrays.items()},
        "files": {name: list(files[name]) for name in names},
    }
    write_durably(directory / MANIFEST, json.dumps(body | {"checksum": _checksum(body)}, indent=1))


def read_manifest(directory: Location) -> Manifest:
    """Read the manifest of a checkpoint. Raises DamagedError if it is missing or unreadable."""
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
        body = json.loads(text)
        checksum = body.pop("checksum")
        if body["format"] != FORMAT:
            raise DamagedError(path, f"has format {body['format']}; this version reads {FORMAT}")
        if checksum != _checksum(body):
            raise DamagedError(path, "does not match its own checksum")
        return Manifest(
            step=body["step"],
            arrays={name: (dtype, tuple(shape)) for name, (dtype, shape) in body["arrays"].items()},
            files={name: (size, crc) for name, (size, crc) in body["files"].items()},
            fingerprint=hashlib.sha256(text).hexdigest(),
        )
    except FileNotFoundError:
        raise DamagedError(path, "is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(path, "is not readable as a manifest") from None


def check_sizes(directory: Location) -> Manifest:
    """Return the manifest if each of its files exists with its size; else raise DamagedError.

    An object store does not tell sizes, and holds no object in part.
    """
    manifest = read_manifest(directory)
    if str(manifest.step) != directory.name:
        raise DamagedError(directory, f"holds the checkpoint of step {manifest.step}")
    found = location.file_sizes(directory)
    for name, (size, _) in manifest.files.items():
        if name not in found:
            raise DamagedError(directory / name, "is missing")
        if found[name] not in (size, None):
            raise DamagedError(directory / name, f"has {found[name]} bytes instead of {size}")
    return manifest


def check_contents(directory: Location, manifest: Manifest, names: list[str]) -> None:
    """Read files in full; raise DamagedError for the first whose checksum differs."""
    for name, found in _read_files(directory, names).items():
        if found != tuple(manifest.files[name]):
            raise DamagedError(directory / name, "does not match its checksum")


def read_meta(directory: Location, manifest: Manifest) -> dict[str, Any]:
    """Read the checkpoint's `meta.json`. Raises DamagedError if its checksum differs."""
    text = (directory / META).read_bytes()
    if zlib.crc32(text) != manifest.files[META][1]:
        raise DamagedError(directory / META, "does not match its checksum")
    return json.loads(text)


def find_damage(directory: Location) -> str | None:
    """Return what is wrong with a checkpoint by names and sizes alone, or None."""
    try:
        check_sizes(directory)
    except DamagedError as error:
        return str(error)
    return None


def step_directories(directory: Location) -> list[Location]:
    """List everything under `directory` that is named like a checkpoint, oldest first.

    In an object store only what has a manifest: the rest was never finished.
    """
    found = _named_like_steps(directory)
    return [p for p in found if not is_remote(p) or MANIFEST in location.entry_names(p)]


def is_unfinished(directory: Location) -> bool:
    """Return whether an object store has, at the URL of a checkpoint, only a part of one."""
    return is_remote(directory) and location.entry_names(directory) <= _OURS  # without a manifest


def _named_like_steps(directory: Location) -> list[Location]:
    found = [directory / n for n in location.entry_names(directory) if _STEP.fullmatch(n)]
    found = [path for path in found if is_remote(path) or path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def complete_steps(directory: Location) -> list[int]:
    """Return the steps of the complete checkpoints, ascending; only sizes are checked."""
    return [int(path.name) for path in step_directories(directory) if find_damage(path) is None]


def remove_leftovers(directory: Location) -> None:
    """Delete what killed saves and removals left behind."""
    if is_remote(directory):
        for path in _named_like_steps(directory):
            if is_unfinished(path) and not (path / ASIDE).exists():
                path.rmtree()
        return
    for path in (directory / name for name in location.entry_names(directory)):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def aside_name(directory: Path, suffix: str) -> Path:
    """Return the free name that `set_aside` gives a local checkpoint."""
    return free_name(directory.with_name(f"{directory.name}.{suffix}"))


def set_aside(directory: Location, suffix: str) -> None:
    """Rename a checkpoint to `STEP.suffix`, so that it counts as none and its step can be saved.

    In an object store it is marked instead; its objects stay until its step is saved again.
    """
    if not is_remote(directory):
        directory.rename(aside_name(directory, suffix))
        return
    (directory / ASIDE).write_bytes((directory / MANIFEST).read_bytes())
    (directory / MANIFEST).unlink()


def remove_checkpoint(directory: Location) -> None:
    """Delete a checkpoint; a half-deleted one never looks complete.

    It is renamed first or, in an object store, its manifest is deleted first.
    """
    if is_remote(directory):
        (directory / MANIFEST).unlink(missing_ok=True)
        directory.rmtree()
        return
    doomed = directory.with_name(f"{directory.name}.removing")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
