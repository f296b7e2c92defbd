"""Hold back what a start changes in its workdir until nothing can refuse the start any more."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from llamajax.files import undo_new_folders


class Acceptance:
    """Changes to make when a start is accepted, and to undo when it is refused.

    undo: close it when the start is refused. It holds what removes folders, locks and claims that a
    start needs before it is accepted. Create an Acceptance before the processes of a run meet, so
    that each of them sees which folders of `workdir` are new.
    """

    def __init__(self, workdir: Path):
        self.undo = contextlib.ExitStack()
        self._held: list[Callable[[], object]] | None = []
        undo_new_folders(workdir.absolute(), self.undo)

    def when_accepted(self, change: Callable[[], object]) -> None:
        """Make `change` once the start is accepted: later, or now if it is accepted already."""
        if self._held is None:
            change()
        else:
            self._held.append(change)

    def accept(self) -> None:
        """Make the changes that were held back. All processes call it at the same point."""
        self.undo.pop_all()
        held, self._held = self._held or (), None
        for change in held:
            change()
