"""Which documents of a batch have the largest loss, and what they say."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from llamajax import data

_LISTED = 5
_EXCERPT_TOKENS = 48
_EXCERPT_CHARACTERS = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A document's part in one sample. loss: mean over its targets, nats; excess: nats by which
    they are together above the mean of the batch (NaN is more than any number)."""

    row: int
    sample_id: int
    source: str  # the prepared directory
    first_token: int  # in the token stream of that directory's split
    num_targets: int
    loss: float
    excess: float
    token_ids: tuple[int, ...]  # its first ones

    def excerpt(self, tokenizer: data.Tokenizer) -> str:
        """How it begins, on one line."""
        text = tokenizer.decode(list(self.token_ids))
        return " ".join(text.split())[:_EXCERPT_CHARACTERS]


def largest(
    mixture: data.Mixture, ids: np.ndarray, batch: Mapping[str, np.ndarray], nll_BT: np.ndarray
) -> tuple[list[Piece], float]:
    """The pieces that add most to the loss of a batch, those that are not finite first; and the
    median loss a token of all its pieces.

    ids: of the samples, one a row; nll_BT: 0 where there is no target.
    """
    seq_len = nll_BT.shape[1]
    mask_BT, tokens_BT = batch["loss_mask"], batch["tokens"]
    finite = np.isfinite(nll_BT)
    mean = nll_BT[finite & mask_BT].mean(dtype=np.float64) if (finite & mask_BT).any() else 0.0
    found = []
    for row, sample_id in enumerate(ids.tolist()):
        source, number = mixture.locate(sample_id, seq_len)
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            count = int(mask_BT[row, here].sum())
            if not count:
                continue
            total = float(nll_BT[row, here].sum(dtype=np.float64))
            first = int(np.flatnonzero(here)[0])
            found.append(
                Piece(
                    row=row,
                    sample_id=sample_id,
                    source=str(source.path),
                    first_token=number * seq_len + first,
                    num_targets=count,
                    loss=total / count,
                    excess=total - count * mean,
                    token_ids=tuple(tokens_BT[row, here][:_EXCERPT_TOKENS].tolist()),
                )
            )
    rank = lambda piece: (np.isfinite(piece.excess), -piece.excess)  # noqa: E731
    median = float(np.median([piece.loss for piece in found])) if found else 0.0
    return sorted(found, key=rank)[:_LISTED], median
