"""The keys of `optim`: the optimizer, its schedule, and an average of the weights."""

import dataclasses
from typing import Literal

from llamajax.config.values import key

Schedule = Literal["cosine", "linear", "wsd", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or Muon on fp32 master weights, after clipping by the global norm."""

    name: Literal["adamw", "muon"] = key(
        "optimizer; muon: of the matrices of layers, scaled so that AdamW's learning rate and "
        "decay carry over, and AdamW of embedding, head and norms",
        default="adamw",
    )
    chain: str | None = key(
        "module:function that returns an optax transformation, in the place of all of this "
        "section but the schedule; none: `name`",
        default=None,
    )
    learning_rate: float = key("peak learning rate", above=0)
    warmup_steps: int = key("steps of linear warm-up from 0", at_least=0)
    schedule: Schedule = key("shape of the learning rate after warm-up")
    decay_steps: int | None = key("wsd: steps of the final linear decay", default=None, at_least=1)
    final_learning_rate: float = key("rate at the last step (unused by constant)", at_least=0)
    beta1: float = key("decay of Adam's first moment", at_least=0, below=1)
    beta2: float = key("decay of Adam's second moment", at_least=0, below=1)
    epsilon: float = key("Adam's epsilon, added outside the square root", above=0)
    weight_decay: float = key("decoupled decay of matrices; norms are never decayed", at_least=0)
    clip_norm: float | None = key("largest global norm of the gradient; none: no clipping", above=0)
    muon_beta: float = key("muon: decay of its momentum", default=0.95, at_least=0, below=1)
    muon_learning_rate: float | None = key(
        "muon: peak learning rate of its matrices; none: learning_rate", default=None, above=0
    )
    moment_dtype: Literal["bfloat16", "float32"] = key(
        "dtype of the moments between updates; bfloat16 is rounded stochastically",
        default="float32",
    )
    ema_decay: float | None = key(
        "decay of an average of the weights, evaluated and saved beside them; none: no average",
        default=None,
        at_least=0,
        below=1,
    )
    offload: bool = key(
        "whether moments are kept in host memory between updates; slower, and saves their bytes "
        "on the device: 8 a weight, 4 of Muon's matrices, half of that in bfloat16",
        default=False,
    )
