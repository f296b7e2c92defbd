"""Refuse a run whose processes differ in config, data or packages.

Each process describes itself as flat facts: a JSON value by key, in the order in which differences
are to be named. Processes that meet in a roll call compare them there, before JAX starts; those
that JAX's own cluster detection joins compare them with a collective.
"""

import functools
import hashlib
import importlib.metadata
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, listed
from llamajax.processes.host_collectives import all_gather_text

Facts = Mapping[str, Any]
# The fact that names why this process cannot start; absent or None where it can.
PROBLEM = "problem"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")
_listed = functools.partial(listed, most=8)


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide about a run's numbers."""
    found = {f"version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    root = Path(__file__).parents[1]
    # Names and sizes find another revision, and read no file.
    files = sorted((str(f.relative_to(root)), f.stat().st_size) for f in root.rglob("*.py"))
    return found | {"code of llamajax": hashlib.sha256(repr(files).encode()).hexdigest()[:12]}


def describe_difference(facts: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """Describe the first fact in which processes differ and who has which value; None if none.

    facts, hosts: by process.
    """
    keys = dict.fromkeys(key for each in facts for key in each)
    differing = [k for k in keys if any(each.get(k) != facts[0].get(k) for each in facts)]
    if not differing:
        return None
    key, by_value = differing[0], {}
    for process, each in enumerate(facts):
        by_value.setdefault(each.get(key), []).append(f"{process} on {hosts[process]}")
    if key == PROBLEM:
        by_value.pop(None, None)
        return "; ".join(f"process {_listed(who)}: {text}" for text, who in by_value.items())
    named = "; ".join(f"{value} in process {_listed(who)}" for value, who in by_value.items())
    others = [k for k in differing[1:] if k != PROBLEM]
    also = f" They also differ in {_listed(others)}." if others else ""
    return (
        f"the processes of this run differ in {key}: {named}.{also} Start all with the same "
        "command, config, data and packages"
    )


def check_same(facts: Facts) -> None:
    """Raise the same UserError on all processes where their facts differ. A collective."""
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(set(all_gather_text(digest))) > 1:
        everyone = map(json.loads, all_gather_text(json.dumps([facts, socket.gethostname()])))
        raise UserError(describe_difference(*zip(*everyone, strict=True)))
