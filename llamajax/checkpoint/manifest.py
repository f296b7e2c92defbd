"""What makes a checkpoint complete: `manifest.json`, written last and committed by one rename.

    checkpoints/STEP/state/**        the arrays, as Orbax writes them
    checkpoints/STEP/meta.json       data position, resolved config, versions
    checkpoints/STEP/manifest.json   the arrays' names, shapes, dtypes; the files' sizes, CRC-32

A directory is a complete checkpoint when its name is a step number and every file of its manifest
is there with its size. The checksums are computed in the background while saving, and checked in
full before anything is read. CRC-32 guards against disks, not against people: it reads 3 GB/s.
"""

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
META = "meta.json"
STATE = "state"
FORMAT = 1

_STEP = re.compile(r"0|[1-9]\d*")
# Orbax's suffix of a save in progress, and ours of a removal in progress.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removing)")
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4


class DamagedError(Exception):
    """A checkpoint cannot be trusted: which file, and what is wrong with it."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path} {problem}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint: arrays as (dtype, shape) by name, files as (size, CRC-32)."""

    step: int
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, tuple[int, int]]


def _body(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": manifest.step,
        "arrays": {name: [dtype, list(shape)] for name, (dtype, shape) in manifest.arrays.items()},
        "files": {name: list(entry) for name, entry in manifest.files.items()},
    }


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def checksum_file(path: Path, *, sync: bool = False) -> int:
    """The CRC-32 of a file; `sync` also forces it from the page cache onto the disk."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
        if sync:
            os.fsync(file.fileno())
    return crc


def write_durably(path: Path, text: str) -> None:
    """Write a small file and force it onto the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(directory: Path, *, step: int, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Checksum all files of a finished save and write its manifest, the last file of all.

    `commit_success.txt` and `_CHECKPOINT_METADATA` at the top are Orbax's own notes about the save,
    still changing at this point and not needed to restore.
    """
    paths = sorted(p for p in (directory / STATE).rglob("*") if p.is_file())
    paths.append(directory / META)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = list(pool.map(lambda path: checksum_file(path, sync=True), paths))
    files = {
        path.relative_to(directory).as_posix(): (path.stat().st_size, crc)
        for path, crc in zip(paths, sums, strict=True)
    }
    body = _body(Manifest(step=step, arrays=arrays, files=files))
    write_durably(directory / MANIFEST, json.dumps(body | {"checksum": _checksum(body)}, indent=1))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError if it is missing or unreadable."""
    path = directory / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("checksum")
        if body["format"] != FORMAT:
            raise DamagedError(path, f"has format {body['format']}; this version reads {FORMAT}")
        if checksum != _checksum(body):
            raise DamagedError(path, "does not match its own checksum")
        return Manifest(
            step=body["step"],
            arrays={name: (dtype, tuple(shape)) for name, (dtype, shape) in body["arrays"].items()},
            files={name: (size, crc) for name, (size, crc) in body["files"].items()},
        )
    except FileNotFoundError:
        raise DamagedError(path, "is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(path, "is not readable as a manifest") from None


def check_sizes(directory: Path) -> Manifest:
    """The manifest, after seeing each of its files there with its size; else DamagedError."""
    manifest = read_manifest(directory)
    if str(manifest.step) != directory.name:
        raise DamagedError(directory, f"holds the checkpoint of step {manifest.step}")
    for name, (size, _) in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedError(path, "is missing")
        if path.stat().st_size != size:
            raise DamagedError(path, f"has {path.stat().st_size} bytes instead of {size}")
    return manifest


def check_contents(
    directory: Path, *, share: tuple[int, int] = (0, 1), only: Iterable[str] | None = None
) -> None:
    """Read files in full and compare their checksums; DamagedError names the first that differs.

    share: (i, n) checks every n-th file from the i-th, so that n processes divide the work.
    only: the names to check; all by default.
    """
    manifest = check_sizes(directory)
    names = sorted(manifest.files if only is None else only)[share[0] :: share[1]]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = pool.map(lambda name: checksum_file(directory / name), names)
        for name, crc in zip(names, sums, strict=True):
            if crc != manifest.files[name][1]:
                raise DamagedError(directory / name, "does not match its checksum")


def step_directories(directory: Path) -> list[Path]:
    """Everything under `directory` that is named like a checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_damage(directory: Path) -> str | None:
    """What is wrong with one checkpoint at first sight (names and sizes), or None."""
    try:
        check_sizes(directory)
    except DamagedError as error:
        return str(error)
    return None


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`, ascending; only sizes are checked."""
    return [int(path.name) for path in step_directories(directory) if find_damage(path) is None]


def remove_leftovers(directory: Path) -> list[str]:
    """Delete what killed saves and removals left behind; returns the names that were deleted."""
    if not directory.is_dir():
        return []
    names = sorted(path.name for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name))
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return names


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint: renamed first, so that a half-deleted one never looks complete."""
    doomed = directory.with_name(f"{directory.name}.removing")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
