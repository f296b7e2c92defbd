"""What makes a checkpoint complete: `manifest.json`, written last and committed by one rename.

In an object store there is no rename: there the manifest itself is the commit.

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
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

from llamajax.checkpoint import storage
from llamajax.checkpoint.storage import Place, is_remote

MANIFEST = "manifest.json"
# In an object store: the manifest of a checkpoint that was found damaged.
ASIDE = "manifest.damaged.json"
META = "meta.json"
STATE = "state"
FORMAT = 1

_STEP = re.compile(r"0|[1-9]\d*")
# Orbax's suffix of a save in progress, and ours of a removal in progress.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removing)")
# What Orbax and we write in the directory of one checkpoint; with anything else it is not ours.
_OURS = {STATE, META, ASIDE, "_CHECKPOINT_METADATA", "commit_success.txt"}
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4


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


def checksum_file(path: Place, *, sync: bool = False) -> int:
    """The CRC-32 of a file; `sync` also forces it from the page cache onto the disk."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
        if sync:
            os.fsync(file.fileno())
    return crc


def write_durably(path: Place, text: str) -> None:
    """Write a small file and force it onto the disk."""
    if is_remote(path):
        path.write_text(text)
        return
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(directory: Place, *, step: int, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Checksum all files of a finished save and write its manifest, the last file of all.

    `commit_success.txt` and `_CHECKPOINT_METADATA` at the top are Orbax's own notes about the save,
    still changing at this point and not needed to restore.
    """
    sizes = {f"{STATE}/{name}": n for name, n in sorted(storage.files(directory / STATE).items())}
    sizes |= storage.sizes(directory, [META])
    sync = not is_remote(directory)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = list(pool.map(lambda name: checksum_file(directory / name, sync=sync), sizes))
    body = {
        "format": FORMAT,
        "step": step,
        "arrays": {name: [dtype, list(shape)] for name, (dtype, shape) in arrays.items()},
        "files": {name: [n, crc] for (name, n), crc in zip(sizes.items(), sums, strict=True)},
    }
    write_durably(directory / MANIFEST, json.dumps(body | {"checksum": _checksum(body)}, indent=1))


def read_manifest(directory: Place) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError if it is missing or unreadable."""
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


def check_sizes(directory: Place) -> Manifest:
    """The manifest, after seeing each of its files there with its size; else DamagedError."""
    manifest = read_manifest(directory)
    if str(manifest.step) != directory.name:
        raise DamagedError(directory, f"holds the checkpoint of step {manifest.step}")
    found = storage.sizes(directory, manifest.files)
    for name, (size, _) in manifest.files.items():
        if name not in found:
            raise DamagedError(directory / name, "is missing")
        if found[name] != size:
            raise DamagedError(directory / name, f"has {found[name]} bytes instead of {size}")
    return manifest


def check_contents(directory: Place, manifest: Manifest, names: Iterable[str]) -> None:
    """Read files in full and compare their checksums; DamagedError names the first that differs."""
    names = list(names)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = pool.map(lambda name: checksum_file(directory / name), names)
        for name, crc in zip(names, sums, strict=True):
            if crc != manifest.files[name][1]:
                raise DamagedError(directory / name, "does not match its checksum")


def read_meta(directory: Place, manifest: Manifest) -> dict[str, Any]:
    """Return the checkpoint's `meta.json`. Raises DamagedError if its checksum differs."""
    text = (directory / META).read_bytes()
    if zlib.crc32(text) != manifest.files[META][1]:
        raise DamagedError(directory / META, "does not match its checksum")
    return json.loads(text)


def step_directories(directory: Place) -> list[Place]:
    """Everything under `directory` that is named like a checkpoint, oldest first.

    In an object store only what has a manifest: the rest was never finished.
    """
    return [path for path in _named_like_steps(directory) if is_committed(path)]


def is_committed(directory: Place) -> bool:
    """Whether what is named like a checkpoint was one when its save ended."""
    return not is_remote(directory) or MANIFEST in storage.names(directory)


def _named_like_steps(directory: Place) -> list[Place]:
    if is_remote(directory):
        found = [directory / name for name in storage.names(directory) if _STEP.fullmatch(name)]
    elif not directory.is_dir():
        return []
    else:
        named = (path for path in directory.iterdir() if _STEP.fullmatch(path.name))
        found = [path for path in named if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_damage(directory: Place) -> str | None:
    """What is wrong with one checkpoint at first sight (names and sizes), or None."""
    try:
        check_sizes(directory)
    except DamagedError as error:
        return str(error)
    return None


def complete_steps(directory: Place) -> list[int]:
    """Steps of the complete checkpoints under `directory`, ascending; only sizes are checked."""
    return [int(path.name) for path in step_directories(directory) if find_damage(path) is None]


def remove_leftovers(directory: Place) -> list[str]:
    """Delete what killed saves and removals left behind; returns the names that were deleted."""
    if is_remote(directory):
        doomed = [p for p in _named_like_steps(directory) if _is_leftover(p)]
        for path in doomed:
            storage.remove_tree(path)
        return [path.name for path in doomed]
    if not directory.is_dir():
        return []
    names = sorted(path.name for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name))
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return names


def _is_leftover(directory: Place) -> bool:
    """Whether a remote directory is of a save that did not end, or a removal that did not."""
    names = storage.names(directory)
    return bool(names) and names <= _OURS and ASIDE not in names


def set_aside(directory: Place) -> None:
    """Mark a damaged checkpoint in an object store: from now on it counts as none.

    Its objects stay until its step is saved again.
    """
    text = (directory / MANIFEST).read_bytes()
    (directory / ASIDE).write_bytes(text)
    (directory / MANIFEST).unlink()


def remove_checkpoint(directory: Place) -> None:
    """Delete a checkpoint so that a half-deleted one never looks complete: renamed first, or, in an
    object store, its manifest first."""
    if is_remote(directory):
        (directory / MANIFEST).unlink(missing_ok=True)
        storage.remove_tree(directory)
        return
    doomed = directory.with_name(f"{directory.name}.removing")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
