"""Readable names for the leaves of a state, and the way back.

A leaf's name is its path, joined by slashes: `model/blocks/attn/wq`, `opt_state/1/0/mu/embed`. The
last component of a Flax variable (`value`) is left out, so that names say where a weight is and not
which class holds it.
"""

from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyEntry, SequenceKey


def _component(entry: KeyEntry) -> str:
    match entry:
        case GetAttrKey(name=name):
            return name
        case DictKey(key=key) | FlattenedIndexKey(key=key):
            return str(key)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            raise TypeError(f"cannot name the path component {entry!r} of a state's leaf")


def leaf_name(path: tuple[KeyEntry, ...]) -> str:
    """The name of a leaf at `path`."""
    parts = [_component(entry) for entry in path]
    if len(parts) > 1 and isinstance(path[-1], GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name, in tree order. Raises ValueError when two share a name."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"two leaves of the state are both named {name!r}")
        named[name] = leaf
    return named


def rebuild(tree: Any, leaves: dict[str, Any]) -> Any:
    """A tree like `tree` whose leaves are taken from `leaves` by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], tree)
