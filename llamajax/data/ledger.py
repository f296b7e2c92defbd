"""The ledger: a hash of the samples that a run has read, in order; saved with every checkpoint.

Resuming is arithmetic on a position (`position.py`). The ledger proves that the arithmetic still
gives the samples that were read: neither a library's shuffle nor ours has changed since.
"""

import collections
import hashlib
from collections.abc import Mapping
from typing import Any

from llamajax.data.batches import sample_ids
from llamajax.data.mixture import Mixture
from llamajax.data.position import Position
from llamajax.errors import UserError

# Steps before a checkpoint that resuming checks; all of them would take hours in a long run.
_CHECKED_STEPS = 32
# Rows of a global batch that are hashed: an id costs up to 40 us on the thread that trains.
_HASHED_ROWS = 64


class Ledger:
    """The digest of each step: the hash of the one before and of sample ids in its global batch.

    Of whole examples the rows that ids name are hashed as well.

    The ids are those of rows spread evenly over the batch. Steps of an earlier release (up to
    `all_rows_until`) hash every row. The digest after step n is the same for any number of
    processes, devices and restarts.

    mixtures: by hash, all that the position has from `step` on. saved: the result of `to_json` in
    the checkpoint of `step`; None if it has none, as at step 0.
    """

    def __init__(
        self,
        mixtures: Mapping[str, Mixture],
        position: Position,
        *,
        step: int,
        saved: Mapping[str, Any] | None,
    ):
        self._mixtures, self._position = mixtures, position
        self._step = step
        self._digest = saved["digest"] if saved else ""
        # An earlier release saved no `all_rows_until`: every step so far has all its rows.
        self._all_rows_until = saved.get("all_rows_until", step) if saved else 0
        recent = [(n, digest) for n, digest in saved["recent"]] if saved else ()
        self._recent: collections.deque = collections.deque(recent, maxlen=_CHECKED_STEPS)

    def add(self, step: int) -> None:
        """Add the samples of update `step`, the one after the last that was added."""
        if step != self._step + 1:
            raise ValueError(f"step {step} does not follow step {self._step}")
        self._recent.append((self._step, self._digest))
        all_rows = step <= self._all_rows_until
        mixture = self._mixtures[self._position.segment(step - 1).mixture_hash]
        self._digest = _next(self._digest, mixture, self._position, step, all_rows=all_rows)
        self._step = step

    def to_json(self) -> dict[str, Any]:
        """Return the digest after the last step, and those before each of the last few."""
        recent = [list(entry) for entry in self._recent]
        return {"digest": self._digest, "recent": recent, "all_rows_until": self._all_rows_until}


def check_ledger(
    saved: Mapping[str, Any], mixtures: Mapping[str, Mixture], position: Position, *, step: int
) -> int:
    """Check that the steps before `step` read the same samples now as then; return how many.

    0 if the data has changed since, which the position knows and continues from. Raises UserError
    if the same data is read in another order.
    """
    segment = position.segment(step - 1)
    mixture = mixtures.get(segment.mixture_hash)
    recent = [(n, digest) for n, digest in saved["recent"] if n >= segment.first_step]
    if not recent or mixture is None:
        return 0
    first, digest = recent[0]
    all_rows_until = saved.get("all_rows_until", step)
    for number in range(first + 1, step + 1):
        digest = _next(digest, mixture, position, number, all_rows=number <= all_rows_until)
    if digest != saved["digest"]:
        raise UserError(
            f"the samples of steps {first + 1} to {step} are not those that this run read then, "
            "though the data is the same: the order of samples is another one in these versions of "
            "llamajax, grain or NumPy. Continue with the versions in run.json, or start anew in "
            "another --workdir with train.init_from"
        )
    return step - first


def _next(digest: str, mixture: Mixture, position: Position, step: int, *, all_rows: bool) -> str:
    """Return the digest after `step` from the one before."""
    segment = position.segment(step - 1)
    size = segment.batch_size
    rows = range(0, size, 1 if all_rows else -(-size // _HASHED_ROWS))
    ids = sample_ids(mixture, position, step - 1, rows=rows).astype("<i8").tobytes()
    cuts = b"".join(each.digest for each in mixture.samples(segment.seq_len, segment.packing))
    return hashlib.blake2b(bytes.fromhex(digest) + ids + cuts, digest_size=16).hexdigest()
