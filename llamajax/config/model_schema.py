"""The config keys of an architecture: `model.*`; the names of its matrices."""

import dataclasses
from typing import Any, Literal

from llamajax.config.values import key

# The matrices of a layer: dimension letters of their inputs and of their outputs.
LORA_TARGETS = {
    "query": ("D", "NH"),
    "key": ("D", "KH"),
    "value": ("D", "KH"),
    "out": ("NH", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}


# Keys of RopeScaling that each type must have, and those that it may have.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"), ()),
    "yarn": (
        ("factor", "original_max_seq_len"),
        ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary embedding is slowed for contexts longer than the original one.

    The types are those of transformers' `rope_type`: linear divides every frequency by `factor`
    (arXiv:2306.15595), llama3 (Llama 3.1) and yarn (arXiv:2309.00071) only low ones, with a blend.
    """

    type: Literal["linear", "llama3", "yarn"] = key("how frequencies are scaled", default="llama3")
    factor: float = key("how many times the original context the model can read", at_least=1)
    low_freq_factor: float | None = key(
        "llama3: wavelengths above original length / this are scaled", default=None, above=0
    )
    high_freq_factor: float | None = key(
        "llama3: wavelengths below original length / this are kept", default=None, above=0
    )
    original_max_seq_len: int | None = key(
        "llama3, yarn: context, in tokens, that the unscaled model was trained with",
        default=None,
        at_least=1,
    )
    beta_fast: float = key(
        "yarn: frequencies with more turns than this in the original context are kept",
        default=32.0,
        above=0,
    )
    beta_slow: float = key(
        "yarn: frequencies with fewer turns than this in the original context are scaled",
        default=1.0,
        above=0,
    )
    attention_factor: float | None = key(
        "yarn: what cosines and sines are multiplied by; none: 0.1 ln(factor) + 1",
        default=None,
        above=0,
    )
    truncate: bool = key(
        "yarn: whether the blend begins and ends at whole pairs of dimensions", default=True
    )

    def given(self) -> dict[str, Any]:
        """Return the keys of its type; of those that it may have, the ones not at their default."""
        required, optional = ROPE_KEYS[self.type]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in optional if getattr(self, name) != defaults[name]]
        return {name: getattr(self, name) for name in ("type", *required, *changed)}

    def __str__(self) -> str:
        (_, kind), *rest = self.given().items()
        return f"{kind} ({', '.join(f'{name}={value}' for name, value in rest)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, which a checkpoint fixes."""

    name: str = key("name of the preset, for people; changes nothing", default="")
    vocab_size: int = key("V: number of tokens in the embedding and the head", at_least=1)
    hidden_size: int = key("D: width of the residual stream", at_least=1)
    intermediate_size: int = key("F: width of the feed-forward layer", at_least=1)
    num_layers: int = key("L: number of blocks", at_least=1)
    num_heads: int = key("N: number of query heads", at_least=1)
    num_kv_heads: int = key("K: number of key and value heads; divides num_heads", at_least=1)
    head_size: int = key("H: width of one head; even", at_least=2)
    rope_theta: float = key("base of the rotary embedding", above=0)
    rope_scaling: RopeScaling | None = key(
        "scaling of the rotary embedding to a longer context, or none", default=None
    )
    norm_eps: float = key("epsilon of RMSNorm", above=0)
    tie_embeddings: bool = key("whether the head is the transposed embedding")
    init_std: float = key("standard deviation of the normal initial weights", above=0)
    max_seq_len: int = key(
        "longest sequence, in tokens, that the architecture is meant for", at_least=1
    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the stored embedding: vocab_size rounded up to 128, so that it splits evenly.

        It is the same for every mesh, so that a checkpoint fits all. The added rows stay zero, are
        never looked up, and have logits of -inf. Published vocabularies need none.
        """
        return -(-self.vocab_size // 128) * 128

    @property
    def dims(self) -> dict[str, int]:
        """The legend: size of each dimension letter of a weight, as it is stored."""
        return {
            "V": self.padded_vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_size,
        }
