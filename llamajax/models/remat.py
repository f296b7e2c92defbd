"""What a block keeps for its backward pass, by name.

| name             | kept besides the block's input                       | recomputed             |
| ---------------- | ---------------------------------------------------- | ---------------------- |
| `none`           | everything but the gathered weights                  | the gathering          |
| `dots`           | outputs of all matrix products with weights, and the | what is element-wise   |
|                  | attention output (and a kernel's row statistics)     |                        |
| `save_qkv`       | rotated q, k, v and the attention output             | the feed-forward       |
| `save_attention` | the attention output (and a kernel's row statistics) | all but attention      |
| `full`           | nothing                                              | the whole block        |

Gathered weights are never kept: that would undo FSDP.
"""

from collections.abc import Callable

import jax

_POLICIES = jax.checkpoint_policies

REMAT: dict[str, Callable] = {
    "none": _POLICIES.save_anything_except_these_names("gathered_weight"),
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("attention")
    ),
    "save_qkv": _POLICIES.save_only_these_names("qkv", "attention"),
    "save_attention": _POLICIES.save_only_these_names("attention"),
    "full": _POLICIES.nothing_saveable,
}


def rematerialised(block: Callable, name: str) -> Callable:
    """`block` keeping for its derivative only what policy `name` says; the same values."""
    return jax.checkpoint(block, policy=REMAT[name], prevent_cse=False)
