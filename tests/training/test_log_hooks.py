"""What a slower step says and logs."""

from types import SimpleNamespace

import numpy as np

from llamajax.data import Position
from llamajax.training.log_hooks import LogHook


def test_a_slower_kernel_is_warned_of_once_and_stands_in_each_row():
    said = []
    run = SimpleNamespace(
        box=SimpleNamespace(add=lambda row: None),
        config=SimpleNamespace(train=SimpleNamespace(seed=0)),
    )
    attempt = SimpleNamespace(
        run=run,
        start=SimpleNamespace(position=Position.start(batch_size=2, seq_len=8, mixture_hash="m")),
        timer=SimpleNamespace(untaken={}),
        programs=SimpleNamespace(at=lambda step: SimpleNamespace(weight_names=())),
        progress=SimpleNamespace(note=said.append),
    )
    log = LogHook(attempt)
    rows = [
        log.inspect(step, {"loss": np.float32(2), "split_attention": np.float32(slow)})
        for step, slow in ((1, 0), (2, 1), (3, 1))
    ]
    assert [row.get("split_attention") for row in rows] == [None, 1, 1]
    (warning,) = said
    assert warning.startswith("warning: step 2 was slower: its documents are too many")
