"""What a test expects of a refusal: its message, and that it leaves every file as it was."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamajax.errors import UserError


def snapshot(*folders: Path) -> dict[str, object]:
    """Every folder, and every file with its contents and the time of its last change."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in paths
        if path.exists()
    }


@contextlib.contextmanager
def refused(*words: str, unchanged: tuple[Path, ...] = ()) -> Iterator[list[str]]:
    """Expect a UserError with all `words` in its message, and no change under `unchanged`.

    Yields a list that has the lines of the message after the block.
    """
    before, lines = snapshot(*unchanged), []
    with pytest.raises(UserError) as caught:
        yield lines
    message = str(caught.value)
    lines += message.splitlines()
    for word in words:
        assert word in message
    assert snapshot(*unchanged) == before
