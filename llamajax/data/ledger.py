"""A hash of the samples that a run has read, in order; saved with every checkpoint.

Resuming is arithmetic on a position (`position.py`). The ledger proves that the arithmetic still
gives what was read: that neither a library's shuffle nor ours became another one since.
"""

import collections
import hashlib
from collections.abc import Mapping
from typing import Any

from llamajax.data.batches import sample_ids
from llamajax.data.mixture import Mixture
from llamajax.data.position import Position
from llamajax.errors import UserError

# Steps before a checkpoint that resuming reads again; all of them would take hours in a long run.
_CHECKED_STEPS = 32
# Rows of a global batch that are hashed: an id costs up to 40 us on the thread that trains.
_HASHED_ROWS = 64


class Ledger:
    """Each step's digest is the hash of the one before and of sample ids in its global batch.

    The ids are those of rows spread evenly over the batch; steps that an earlier release entered
    (up to `all_rows_until`) hash every row. The digest after step n is the same for any number of
    processes, devices and restarts.

    saved: what `to_json` gave for the checkpoint of `step`; None where it has none, as at step 0.
    """

    def __init__(
        self, mixture: Mixture, position: Position, *, step: int, saved: Mapping[str, Any] | None
    ):
        self._mixture, self._position = mixture, position
        self._step = step
        self._digest = saved["digest"] if saved else ""
        # An earlier release saved no `all_rows_until`: every step so far has all its rows.
        self._all_rows_until = saved.get("all_rows_until", step) if saved else 0
        self._recent: collections.deque = collections.deque(maxlen=_CHECKED_STEPS)
        if saved:
            self._recent.extend((n, digest) for n, digest in saved["recent"])

    def add(self, step: int) -> None:
        """Enter the samples of update `step`, the one after the last that was entered."""
        if step != self._step + 1:
            raise ValueError(f"step {step} does not follow step {self._step}")
        self._recent.append((self._step, self._digest))
        self._digest = _after(
            self._digest, self._mixture, self._position, step, all_rows=step <= self._all_rows_until
        )
        self._step = step

    def to_json(self) -> dict[str, Any]:
        """The digest after the last step, and those before each of the last few."""
        recent = [list(entry) for entry in self._recent]
        return {"digest": self._digest, "recent": recent, "all_rows_until": self._all_rows_until}


def check_ledger(
    saved: Mapping[str, Any], mixture: Mixture, position: Position, *, step: int
) -> int:
    """How many steps before `step` were seen to read the same samples now as they did then.

    0 where the data has changed since (a change that the position knows of and continues from).
    Raises UserError when the same data is read in another order.
    """
    recent = [(n, digest) for n, digest in saved["recent"] if n >= position.segments[-1].first_step]
    if not recent or position.segment(step - 1).mixture_hash != mixture.hash:
        return 0
    first, digest = recent[0]
    all_rows_until = saved.get("all_rows_until", step)
    for number in range(first + 1, step + 1):
        digest = _after(digest, mixture, position, number, all_rows=number <= all_rows_until)
    if digest != saved["digest"]:
        raise UserError(
            f"the samples of steps {first + 1} to {step} are not those that this run read then, "
            "though the data is the same: the order of samples is another one in these versions of "
            "llamajax, grain or NumPy. Continue with the versions in run.json, or start anew in "
            "another --workdir with train.init_from"
        )
    return step - first


def _after(digest: str, mixture: Mixture, position: Position, step: int, *, all_rows: bool) -> str:
    at_most = None if all_rows else _HASHED_ROWS
    ids = sample_ids(mixture, position, step - 1, at_most=at_most).astype("<i8").tobytes()
    return hashlib.blake2b(bytes.fromhex(digest) + ids, digest_size=16).hexdigest()
