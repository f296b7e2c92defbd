"""Probes that train: a tiny Llama by llamajax's own step, whose losses are known.

They cover all that is between a seed and a loss: initial weights, packed documents, the model, the
loss in chunks, clipping, Adam, decay, the schedule, on as many devices as divide the model.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llamajax import optim, sharding
from llamajax.checkpoint import Checkpointer, named_leaves, newest_checkpoint, restore_state
from llamajax.config.schema import MeshConfig, ModelConfig, OptimConfig, TrainConfig
from llamajax.conformance.bench import Bench, WrongError
from llamajax.errors import listed
from llamajax.models.llama import Compute
from llamajax.ops.attention import best_attention
from llamajax.training.state import StateSpec, TrainState
from llamajax.training.step import train_step

STEPS = 20
MODEL = ModelConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    rope_theta=12_345.0,
    norm_eps=3e-5,
    tie_embeddings=False,
    init_std=0.05,
    max_seq_len=64,
)
OPTIM = OptimConfig(
    learning_rate=1e-2,
    warmup_steps=4,
    schedule="cosine",
    final_learning_rate=1e-3,
    beta1=0.85,
    beta2=0.93,
    epsilon=1e-5,
    weight_decay=0.2,
    clip_norm=0.7,
)
# Losses of the steps on one CPU device in float32, jax 0.10.2.
REFERENCE = np.array([
    4.6338916, 4.6538486, 4.3912883, 4.4018497, 4.1917920,
    4.1451416, 3.9813118, 3.9132860, 3.7304511, 3.6614730,
    3.4943752, 3.4334579, 3.2792206, 3.2419477, 3.1071370,
    3.0971971, 2.9862700, 3.0013793, 2.9094183, 2.9393947,
])  # fmt: skip
# Relative. float32: rounding alone, which Adam makes larger from step to step. bfloat16: seen on a
# CPU 2e-3; a matrix product whose sums are kept in bfloat16 is found by its own probe.
_FLOAT32_TOLERANCES = np.array([1e-5] * 5 + [1e-4] * (STEPS - 5))
_BFLOAT16_TOLERANCES = np.full(STEPS, 1e-2)
_ROWS, _TOKENS = 16, 24
_SHORT = 4


def batches() -> list[dict[str, np.ndarray]]:
    """Return two batches to be used in turn: two documents a row, some padding."""
    rng = np.random.RandomState(0)  # its numbers never change
    found = []
    for _ in range(2):
        tokens = rng.randint(0, MODEL.vocab_size, (_ROWS, _TOKENS + 1)).astype(np.int32)
        border, at = rng.randint(1, _TOKENS, (_ROWS, 1)), np.arange(_TOKENS)
        after, used = at >= border, at < rng.randint(_TOKENS // 2, _TOKENS + 1, (_ROWS, 1))
        found.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "positions": np.where(after, at - border, at).astype(np.int32),
                "segment_ids": np.where(used, 1 + after, 0).astype(np.int32),
                "loss_mask": used & (at != border - 1),
            }
        )
    return found


class TinyRun:
    """A run of the tiny model in one dtype: its step, compiled, and its batches.

    On fsdp and tensor, over a power of two of the devices, 8 at most.
    """

    def __init__(self, devices: Sequence[Any], *, dtype: str, attention: str):
        count = 1 << min(3, len(devices).bit_length() - 1)
        tensor = 2 if count > 2 else 1
        axes = MeshConfig(fsdp=count // tensor, tensor=tensor)
        self.mesh = mesh = sharding.build_mesh(axes, devices[:count])
        compute = Compute(
            dtype=jnp.dtype(dtype),
            remat="full",
            attention=attention,
            loss_chunk_tokens=50,
            split_tokens=tensor > 1,
        )
        optimizer = optim.build(OPTIM, steps=STEPS)
        self.abstract = StateSpec(model=MODEL, optimizer=optimizer, mesh=mesh).abstract()
        train = TrainConfig(steps=STEPS, seed=7, dtype=dtype)
        self.batches = [sharding.put_batch(batch, mesh) for batch in batches()]
        jitted = train_step(optimizer, OPTIM, train, compute, mesh)
        state = self.initial_state()
        begun = time.monotonic()
        self.step = jitted.lower(state, self.batches[0]).compile()
        self.compile_s = time.monotonic() - begun

    def initial_state(self) -> TrainState:
        """Return the state of step 0, on its devices."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.device_put(_initial_arrays(self.mesh), shardings)

    def aliased(self) -> str:
        """Return how much of the state is updated in its own memory, in words."""
        memory = self.step.memory_analysis()
        if memory is None:
            return "aliased bytes unknown"
        arrays = jax.tree.leaves(self.initial_state())
        size = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        return f"{memory.alias_size_in_bytes / size:.0%} of the state aliased"

    def run(self, state: TrainState, steps: range) -> tuple[TrainState, list[float]]:
        """Return the state after some more steps, and their losses."""
        losses = []
        for n in steps:
            state, metrics = self.step(state, self.batches[n % 2])
            losses.append(metrics["loss"].item())
        return state, losses


@functools.cache
def _initial_arrays(mesh: Mesh) -> TrainState:
    """Return the state of step 0 as the devices made it, on the host: the same for every dtype."""
    spec = StateSpec(model=MODEL, optimizer=optim.build(OPTIM, steps=STEPS), mesh=mesh)
    return jax.device_get(spec.init(7))


# Each is compiled once in a process.
_compiled_run = functools.cache(TinyRun)


def _tiny_run(bench: Bench, dtype: str) -> TinyRun:
    attention = best_attention(bench.machine, dtype, MODEL.head_size, _TOKENS).impl
    return _compiled_run(tuple(bench.devices), dtype=dtype, attention=attention)


def train_float32(bench: Bench) -> str:
    """Train twenty steps along the reference's losses."""
    return _follow_reference(bench, "float32", _FLOAT32_TOLERANCES)


def train_bfloat16(bench: Bench) -> str:
    """Train the same steps, computed in bfloat16 around float32 weights."""
    return _follow_reference(bench, "bfloat16", _BFLOAT16_TOLERANCES)


def _follow_reference(bench: Bench, dtype: str, limit: np.ndarray) -> str:
    tiny = _tiny_run(bench, dtype)
    state, first = tiny.run(tiny.initial_state(), range(1))
    begun = time.monotonic()
    _, losses = tiny.run(state, range(1, STEPS))
    step_s = (time.monotonic() - begun) / (STEPS - 1)
    losses = np.array(first + losses)
    error = np.abs(losses / REFERENCE - 1)
    mesh = sharding.describe(tiny.mesh)
    if not np.all(error <= limit):
        step = int(np.argmax(~(error <= limit)))
        raise WrongError(
            f"loss of step {step + 1} is {losses[step]:.6f}, not {REFERENCE[step]:.6f} as on the "
            f"reference: {error[step]:.1e} off where {limit[step]:.0e} is allowed ({mesh})"
        )
    return (
        f"{mesh}: losses {losses[0]:.6f} to {losses[-1]:.6f}, within {error.max():.1e} of the "
        f"reference; compiled in {tiny.compile_s:.1f} s, {step_s * 1e3:.1f} ms a step, "
        f"{tiny.aliased()}"
    )


def reproducible(bench: Bench) -> str:
    """Train the same steps twice from the same state."""
    tiny = _tiny_run(bench, "float32")
    (first, losses), (second, again) = (
        tiny.run(tiny.initial_state(), range(_SHORT)) for _ in range(2)
    )
    if losses != again:
        raise WrongError(f"losses {losses} the first time, {again} the second")
    if differing := _differing(first, second):
        raise WrongError(f"the same losses, but other bits in {differing}")
    return f"{_SHORT} steps twice: the same losses and the same bits of the whole state"


def checkpoint_synchronous(bench: Bench) -> str:
    """Save, restore, compare, and train on."""
    return _save_and_restore(bench, asynchronous=False)


def checkpoint_asynchronous(bench: Bench) -> str:
    """Do the same while two more steps donate what is being saved."""
    return _save_and_restore(bench, asynchronous=True)


def _save_and_restore(bench: Bench, *, asynchronous: bool) -> str:
    tiny = _tiny_run(bench, "float32")
    state, _ = tiny.run(tiny.initial_state(), range(2))
    kept = jax.device_get(state)
    options = {"keep": 1, "keep_every": None, "asynchronous": asynchronous}
    with Checkpointer(bench.folder / "checkpoints", **options) as checkpointer:
        started = time.monotonic()
        checkpointer.save(2, state, meta={})
        stall_s = time.monotonic() - started
        _, losses = tiny.run(state, range(2, 4))
        checkpointer.wait()
        stored = newest_checkpoint(checkpointer.directory)
        restored = restore_state(stored, tiny.abstract, donated=True)
    if differing := _differing(kept, restored):
        raise WrongError(f"other bits came back in {differing}")
    if tiny.run(restored, range(2, 4))[1] != losses:
        raise WrongError("two steps from the restored state have other losses")
    return f"the same bits and losses after restoring; the loop waited {stall_s * 1e3:.0f} ms"


def _differing(a: Any, b: Any) -> str:
    """Return the names of arrays that are not equal bit for bit; empty where all are."""
    others = named_leaves(b)
    wrong = [
        name
        for name, x in named_leaves(a).items()
        if np.asarray(x).tobytes() != np.asarray(others[name]).tobytes()
    ]
    return listed(wrong, most=3)
