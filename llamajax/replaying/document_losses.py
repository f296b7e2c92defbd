"""The documents of a batch with the largest loss, and how they begin."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llamajax import data
from llamajax.data.mixture import Sample

_LISTED = 5
_EXCERPT_TOKENS = 48
_EXCERPT_CHARACTERS = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentPart:
    """A document's part in one sample.

    loss: mean over its targets, nats. excess: nats by which they are together above the mean of
    the batch.
    """

    row: int
    sample_id: int
    source: str  # the prepared directory
    first_token: int  # in the token stream of that directory's split
    num_targets: int
    loss: float
    excess: float
    token_ids: tuple[int, ...]  # the first ones

    def excerpt(self, tokenizer: data.Tokenizer) -> str:
        """Decode its beginning, on one line."""
        text = tokenizer.decode(list(self.token_ids))
        return " ".join(text.split())[:_EXCERPT_CHARACTERS]


class DocumentLosses(NamedTuple):
    """The parts that add most to a batch's loss, and the median loss a token of all parts."""

    largest: list[DocumentPart]
    median: float


def document_losses(
    ids: Sequence[int],
    samples: Sequence[Sample],
    batch: Mapping[str, np.ndarray],
    nll_BT: np.ndarray,
) -> DocumentLosses:
    """Rank the documents of a batch by their excess; losses that are not finite come first.

    ids, samples: one a row; nll_BT: 0 where there is no target.
    """
    mask_BT, tokens_BT = batch["loss_mask"], batch["tokens"]
    counted = np.isfinite(nll_BT) & mask_BT
    mean = nll_BT[counted].mean(dtype=np.float64) if counted.any() else 0.0
    found = []
    for row, (sample_id, sample) in enumerate(zip(ids, samples, strict=True)):
        stream = np.concatenate([np.arange(n, n + size) for n, size in sample.pieces.tolist()])
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            count = int(mask_BT[row, here].sum())
            if not count:
                continue
            total = float(nll_BT[row, here].sum(dtype=np.float64))
            found.append(
                DocumentPart(
                    row=row,
                    sample_id=sample_id,
                    source=str(sample.source.path),
                    first_token=int(stream[np.flatnonzero(here)[0]]),
                    num_targets=count,
                    loss=total / count,
                    excess=total - count * mean,
                    token_ids=tuple(tokens_BT[row, here][:_EXCERPT_TOKENS].tolist()),
                )
            )
    found.sort(key=lambda part: (np.isfinite(part.excess), -part.excess))
    median = float(np.median([part.loss for part in found])) if found else 0.0
    return DocumentLosses(found[:_LISTED], median)
