"""The config keys of an architecture: `model.*`; the names of its matrices."""

import dataclasses

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3.1's frequency scaling of the rotary embedding (`rope_type: llama3`)."""

    factor: float = key("how many times the original context the model can read", at_least=1)
    low_freq_factor: float = key("wavelengths above original length / this are scaled", above=0)
    high_freq_factor: float = key("wavelengths below original length / this are kept", above=0)
    original_max_seq_len: int = key(
        "context, in tokens, that the unscaled model was trained with", at_least=1
    )


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
        "Llama-3.1 scaling of the rotary embedding, or none", default=None
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
