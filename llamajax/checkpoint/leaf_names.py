"""Readable names for the leaves of a state.

A leaf's name is its path, joined by slashes: `model/blocks/attn/wq`, `opt_state/1/0/mu/embed`. The
last component of a Flax variable (`value`) is left out, so that a name says where a weight is and
not which class holds it.
"""

from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyEntry, keystr


def leaf_name(path: tuple[KeyEntry, ...]) -> str:
    """Return the name of the leaf at `path`."""
    name = keystr(path, simple=True, separator="/")
    is_attribute = bool(path) and isinstance(path[-1], GetAttrKey)
    return name.removesuffix("/value") if is_attribute else name


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` by name, in tree order. ValueError when two share a name."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"two leaves of the state are both named {name!r}")
        named[name] = leaf
    return named


def rebuild(tree: Any, leaves: dict[str, Any]) -> Any:
    """Return a tree like `tree` whose leaves are taken from `leaves` by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], tree)
