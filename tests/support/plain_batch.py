"""A batch without packing, for tests of the model and the step."""

import numpy as np


def plain_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of (B, T + 1) tokens: each row is one document and every target counts."""
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return {
        "tokens": inputs,
        "targets": targets,
        "positions": np.ascontiguousarray(positions),
        "segment_ids": np.ones_like(inputs),
        "loss_mask": np.ones(inputs.shape, bool),
    }
