"""A prepared split as rows to score, packed and masked as in training."""

from pathlib import Path

import numpy as np

from llamajax.data.batches import make_batch
from llamajax.data.mixture import Sample
from llamajax.data.packing import EXAMPLES, cut_shares
from llamajax.data.prepared_split import open_split
from llamajax.errors import UserError


class PackedRows:
    """The samples of one split of a prepared directory; every target once.

    Of instructions whole examples, however a model was trained: each answer with its prompt, but in
    examples over `seq_len` + 1 tokens, which are cut. facts: of these, as `cut_shares` has them.
    """

    def __init__(
        self, path: Path, *, split: str, seq_len: int, mask_documents: bool, vocab_size: int
    ) -> None:
        try:
            self._source = open_split(path, split, verify=False)
        except UserError as error:
            raise UserError(f"--split={split}: {error}") from None
        tokens = self._source.manifest["tokenizer"]["vocab_size"]
        if tokens > vocab_size:
            raise UserError(
                f"--data={path}: its tokens are 0..{tokens - 1}, the vocabulary of the model "
                f"0..{vocab_size - 1}: prepare the text again with the model's tokenizer"
            )
        self.protocol = "whole_examples" if self._source.masked else "packed"
        self._mask_documents = mask_documents
        self.seq_len = seq_len
        self._samples = self._source.samples(seq_len, EXAMPLES)
        self.num_rows = self._samples.count_all
        masked = self._source.masked
        self.facts = cut_shares([self._source.examples], seq_len, EXAMPLES) if masked else {}

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the text of the whole split; None where only answers are scored."""
        return self._source.text_bytes

    def batch(self, rows: range) -> dict[str, np.ndarray]:
        """Return these samples as arrays (B, T); those from `num_rows` on are padding."""
        samples = [
            Sample(self._source, n, self._samples.pieces(n)) if n < self.num_rows else None
            for n in rows
        ]
        batch = make_batch(samples, self.seq_len, mask_documents=self._mask_documents)
        if not self._mask_documents:
            del batch["segment_ids"]
        return batch
