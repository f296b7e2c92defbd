"""Reads what write_references.py stored."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of NAME.npz."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@functools.cache
def facts() -> dict[str, Any]:
    """Token ids, texts and versions."""
    return json.loads((FOLDER / "facts.json").read_text("utf-8"))
