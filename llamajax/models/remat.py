"""What a block keeps for its backward pass, by name.

| name             | kept besides the block's input                       | recomputed             |
| ---------------- | ---------------------------------------------------- | ---------------------- |
| `none`           | everything but the gathered weights                  | the gathering          |
| `dots`           | outputs of all matrix products with weights, and the | what is element-wise   |
|                  | attention output (and a kernel's row statistics)     |                        |
| `save_qkv`       | rotated q, k, v and the attention output             | the feed-forward       |
| `save_attention` | the attention output (and a kernel's row statistics) | all but attention      |
| `full`           | nothing                                              | the whole block        |

Besides these, single tensors can be kept by their checkpoint name, on the device or in the host's
memory, where the host has room and the link to it has time: a block's `block_input` is what `full`
keeps. Gathered weights are never kept: that would undo FSDP.
"""

from collections.abc import Callable
from typing import Any

import jax

_POLICIES = jax.checkpoint_policies

_KEPT_NAMES = {
    "save_qkv": ("qkv", "attention"),
    "save_attention": ("attention",),
    "full": (),
}

# Operations that compute nothing: to keep their result is to keep their operand.
_ARRANGING = ("reshape", "squeeze", "broadcast_in_dim", "pvary", "name")


def _save_all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """Refuse derivatives that name their result "gathered_weight", and what is arranged of it.

    A policy that refused the name alone would keep the same value from before it was named, or
    behind it, flattened for its product.
    """
    equations = getattr(params.get("call_jaxpr"), "eqns", ())
    is_weight = any(e.params.get("name") == "gathered_weight" for e in equations)
    return not (is_weight or primitive.name in _ARRANGING)


REMAT: dict[str, Callable] = {
    "none": _save_all_but_gathered_weights,
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names("attention", "product"),
    ),
} | {name: _POLICIES.save_only_these_names(*kept) for name, kept in _KEPT_NAMES.items()}


def remat_policy(
    name: str, *, keep: tuple[str, ...] = (), offload: tuple[str, ...] = ()
) -> Callable:
    """Return policy `name` of REMAT for `jax.checkpoint`; it also keeps or offloads named tensors.

    keep: on the device; offload: in pinned memory of the host.
    """
    if not keep and not offload:
        return REMAT[name]
    return _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=sorted({*_KEPT_NAMES[name], *keep} - {*offload}),
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )
