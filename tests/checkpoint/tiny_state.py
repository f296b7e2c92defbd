"""A small state like the training state (a module in a module, an optax chain, a step); damage."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamajax.checkpoint import (
    Checkpointer,
    named_leaves,
    newest_checkpoint,
    open_checkpoint,
    restore_state,
)
from llamajax.checkpoint.manifest import read_manifest

META = {"config": {"model": {"hidden_size": 16, "name": "tiny"}}, "position": [[0, 0, 8, 64, "a"]]}


class Block(nnx.Module):
    def __init__(self, key: jax.Array):
        self.wq = nnx.Param(jax.random.normal(key, (16, 24), jnp.bfloat16), axes="DN")
        self.norm = nnx.Param(jax.random.normal(key, (16,), jnp.float32), axes="D")


class Model(nnx.Module):
    def __init__(self, key: jax.Array):
        self.blocks = Block(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    model: Any
    opt_state: Any
    step: jax.Array


def make_mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    count = shape[0] * shape[1]
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[:count])


def spec(leaf: Any) -> P:
    return P("fsdp", "tensor") if len(leaf.shape) == 2 else P()


def make_state(shape: tuple[int, int], *, seed: int = 0) -> State:
    """The state of a seed, on a mesh of that shape."""
    model, mesh = Model(jax.random.key(seed)), make_mesh(shape)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95, 1e-8))
    state = State(model, optimizer.init(model), jnp.asarray(7 + seed, jnp.int32))
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)


def abstract(state: Any, shape: tuple[int, int]) -> Any:
    """What to restore a state as, on a mesh of that shape."""
    mesh = make_mesh(shape)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))),
        state,
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal names, dtypes, shapes and bits of all leaves."""
    old, new = named_leaves(expected), named_leaves(actual)
    assert list(old) == list(new)
    for name in old:
        a, b = np.asarray(new[name]), np.asarray(old[name])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def checkpointer(directory: Path, **options: Any) -> Checkpointer:
    """A Checkpointer that has begun."""
    run = Checkpointer(
        directory, **{"keep": 3, "keep_every": None, "asynchronous": True, **options}
    )
    run.begin()
    return run


def restore(directory: Path, wanted: Any, step: int | None = None, **options: Any) -> Any:
    """The state of one checkpoint under `directory`, the newest by default."""
    found = newest_checkpoint(directory) if step is None else open_checkpoint(directory / str(step))
    return restore_state(found, wanted, **options)


def newest(run: Checkpointer) -> tuple[int | None, list[str]]:
    """The step at which a run continues, and what it says."""
    found, words = run.newest_intact()
    return (None if found is None else found.step), words


def largest(directory: Any) -> Any:
    """The file that holds most of the arrays of a checkpoint."""
    found = {n: f for n, f in read_manifest(directory).files.items() if "/d/" in n}
    return directory / max(found, key=found.get)


def rewritten(path: Any, change: Callable[[bytes], bytes]) -> Any:
    """Change the content of a file; return its path."""
    path.write_bytes(change(path.read_bytes()))
    return path


# Each damages a checkpoint and returns the file that a message must name.
def truncate(directory: Any) -> Any:
    return rewritten(largest(directory), lambda data: data[:-1])


def flip(directory: Any) -> Any:
    def flipped(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    return rewritten(largest(directory), flipped)


def remove(directory: Any) -> Any:
    path = largest(directory)
    path.unlink()
    return path


def remove_manifest(directory: Path) -> Path:
    (directory / "manifest.json").unlink()
    return directory / "manifest.json"


def edit_manifest(directory: Path) -> Path:
    return rewritten(directory / "manifest.json", lambda t: t.replace(b"bfloat16", b"float16"))


def edit_meta(directory: Path) -> Path:
    return rewritten(directory / "meta.json", lambda text: text.replace(b"tiny", b"tidy"))


def empty(directory: Path) -> Path:
    shutil.rmtree(directory)
    directory.mkdir()
    return directory / "manifest.json"
