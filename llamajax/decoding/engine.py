"""Batches of prompts through the two programs: shapes, compiled programs, times.

A program is compiled for a bucket of shapes and kept: a session of prompts of any length compiles
as many as there are powers of two up to the context, twice at most, whatever the prompts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llamajax import backends, sharding
from llamajax.config.schema import ModelConfig
from llamajax.decoding import kv_cache as kv
from llamajax.decoding.decode_steps import NOTHING, decode, prefill
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.prompts import Prompt
from llamajax.models.llama import Compute, Llama
from llamajax.ops.attention import first_supported

CHUNK = 32  # new tokens of a row between two looks of the host


@dataclasses.dataclass
class Times:
    """Sums over the batches so far; compiling counts apart."""

    batches: int = 0
    prefill_s: float = 0.0  # from the prompts on the host to their first new tokens there
    decode_s: float = 0.0
    decode_tokens: int = 0  # of prompts, without their first
    compile_s: float = 0.0


class Engine:
    """New tokens for prompts, by one model on one mesh.

    `attention` names the implementation for prompts of a given length; `stop_ids` end a row.
    """

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        *,
        dtype: jnp.dtype,
        attention: Callable[[int], str],
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> None:
        self.times = Times()
        self.programs: dict[tuple, Any] = {}
        self._model, self._mesh = model, mesh
        self._dtype, self._attention = jnp.dtype(dtype), attention
        self._sampling, self._stop_ids = sampling, tuple(stop_ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        interval_s: float | None = None,
    ) -> Iterator[list[list[int]]]:
        """The next new tokens of each prompt, again and again until all have stopped.

        The stop token is the last of its row. Prompts are not empty. `interval_s` asks for tokens
        about that often, for a person who watches; without it they come in the largest chunks.
        """
        max_new_tokens = max(prompt.max_new_tokens for prompt in prompts)
        longest = max(len(prompt.ids) for prompt in prompts)
        slots = kv.prompt_slots(longest, max_seq_len=self._model.config.max_seq_len)
        inputs = self._inputs(prompts, slots, np.uint32(seed))
        run = self._prefill(inputs, slots, slots + kv.new_slots(max_new_tokens))
        start = time.perf_counter()
        rows, tokens_B = run(self._model, *inputs)
        first = np.asarray(tokens_B)[: len(prompts), None]
        self.times.batches += 1
        self.times.prefill_s += time.perf_counter() - start
        yield _kept(first)
        stopped = np.isin(first[:, 0], self._stop_ids)
        count, steps = 1, CHUNK if interval_s is None else 1
        while count < max_new_tokens and not stopped.all():
            steps = min(steps, max_new_tokens - count)
            run = self._decode(rows, inputs[-1])
            start = time.perf_counter()
            rows, tokens_BC = run(self._model, rows, inputs[-1], np.int32(steps))
            tokens_BC = np.asarray(tokens_BC)[: len(prompts), :steps]
            elapsed_s = time.perf_counter() - start
            self.times.decode_s += elapsed_s
            self.times.decode_tokens += int((tokens_BC != NOTHING).sum())
            count += steps
            stopped |= np.isin(tokens_BC, self._stop_ids).any(axis=1)
            yield _kept(tokens_BC)
            if interval_s is not None:
                steps = max(1, min(CHUNK, int(interval_s / (elapsed_s / steps))))

    def _inputs(self, prompts: Sequence[Prompt], slots: int, seed: np.uint32) -> tuple:
        """What the prefill takes besides the model; rows that are no prompt fill up the batch."""
        shards = sharding.batch_shards(self._mesh)
        size = shards * kv.bucket(-(-len(prompts) // shards))
        tokens, lengths = np.zeros((size, slots), np.int32), np.ones(size, np.int32)
        numbers, running = np.zeros(size, np.int32), np.zeros(size, bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.ids)] = prompt.ids
            lengths[row], numbers[row], running[row] = len(prompt.ids), prompt.number, True
        spec = sharding.spec("B", sharding.ACTIVATIONS, self._mesh)
        place = lambda x: jax.device_put(x, NamedSharding(self._mesh, spec))  # noqa: E731
        return *(place(x) for x in (tokens, lengths, numbers, running)), seed

    def _prefill(self, inputs: tuple, prompt_slots: int, slots: int) -> Callable:
        key = ("prefill", len(inputs[1]), prompt_slots, slots)
        step = lambda: prefill(  # noqa: E731
            self._mesh,
            self._model,
            self._compute(self._attention(prompt_slots)),
            self._sampling,
            self._stop_ids,
            slots=slots,
        )
        return self._program(key, step, (self._model, *inputs))

    def _decode(self, rows: Any, seed: np.uint32) -> Callable:
        key = ("decode", len(rows.tokens_B), rows.cache.k_LBKSH.shape[3])
        compute = self._compute("xla")  # one query a row: no kernel for that
        step = lambda: decode(  # noqa: E731
            self._mesh, self._model, compute, self._sampling, self._stop_ids, chunk=CHUNK
        )
        return self._program(key, step, (self._model, rows, seed, np.int32(CHUNK)))

    def _compute(self, attention: str) -> Compute:
        return Compute(dtype=self._dtype, remat="none", attention=attention, loss_chunk_tokens=1)

    def _program(self, key: tuple, step: Callable[[], Any], arguments: tuple) -> Callable:
        if key not in self.programs:
            start = time.perf_counter()
            self.programs[key] = step().lower(*arguments).compile()
            self.times.compile_s += time.perf_counter() - start
        return self.programs[key]


def attention_chooser(
    machine: backends.Machine, model: ModelConfig, dtype: str
) -> Callable[[int], str]:
    """The best implementation here for prompts of a given length."""

    def choose(seq_len: int) -> str:
        return first_supported(
            machine.attention_preferences,
            platform=machine.platform,
            compute_capability=machine.compute_capability,
            dtype=dtype,
            head_size=model.head_size,
            seq_len=seq_len,
        )

    return choose


def _kept(tokens_BC: np.ndarray) -> list[list[int]]:
    return [[int(i) for i in row if i != NOTHING] for row in tokens_BC]
