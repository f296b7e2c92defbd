"""Batches of prompts through the two programs of decoding: shapes, compiled programs, times.

A program is compiled for a bucket of shapes and kept: for prompts of any length there are at most
two programs for each power of two up to the context.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding

from llamajax import sharding
from llamajax.backends import undonated_warnings
from llamajax.decoding import kv_cache as kv
from llamajax.decoding.decode_steps import NOTHING, decode, prefill
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.prompts import Prompt
from llamajax.errors import say
from llamajax.formats.load_model import LoadedModel
from llamajax.models.llama import Compute

CHUNK = 32  # new tokens of a row between two readings by the host


@dataclasses.dataclass
class Times:
    """Sums over the batches so far; compiling is not part of the others."""

    batches: int = 0
    prefill_s: float = 0.0  # from the prompts on the host to their first new tokens on the host
    decode_s: float = 0.0
    decode_tokens: int = 0  # of prompts, without their first
    compile_s: float = 0.0


class Engine:
    """Makes new tokens for prompts with one model. `stop_ids` end a row."""

    def __init__(self, loaded: LoadedModel, *, sampling: Sampling, stop_ids: Sequence[int]) -> None:
        self.times = Times()
        self.programs: dict[tuple, Any] = {}
        self._loaded, self._model, self._mesh = loaded, loaded.model, loaded.mesh
        self._sampling, self._stop_ids = sampling, tuple(stop_ids)
        self._warn = functools.cache(lambda line: say(f"warning: {line}"))  # once each

    def generate(
        self, prompts: Sequence[Prompt], *, seed: int, interval_s: float | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield all new tokens of each prompt so far, whenever there are more: the same lists.

        A prompt ends with a stop token or at its own `max_new_tokens`. Prompts are not empty.
        `interval_s` asks for tokens about that often, for a person who watches; without it they
        come in the largest chunks.
        """
        max_new_tokens = max(prompt.max_new_tokens for prompt in prompts)
        inputs, run = self._begin(prompts, seed)
        start = time.perf_counter()
        rows, tokens_B = run(self._model, *inputs)
        first_B1 = _to_host(tokens_B)[: len(prompts), None]
        self.times.batches += 1
        self.times.prefill_s += time.perf_counter() - start
        new: list[list[int]] = [[] for _ in prompts]
        _append(new, first_B1, prompts)
        yield new
        stopped = np.isin(first_B1[:, 0], self._stop_ids)
        count, steps = 1, CHUNK if interval_s is None else 1
        while count < max_new_tokens and not stopped.all():
            steps = min(steps, max_new_tokens - count)
            run = self._decode(rows, inputs[-1])
            start = time.perf_counter()
            rows, tokens_BC = run(self._model, rows, inputs[-1], np.int32(steps))
            tokens_BC = _to_host(tokens_BC)[: len(prompts), :steps]
            elapsed_s = time.perf_counter() - start
            self.times.decode_s += elapsed_s
            self.times.decode_tokens += int((tokens_BC != NOTHING).sum())
            count += steps
            stopped |= np.isin(tokens_BC, self._stop_ids).any(axis=1)
            _append(new, tokens_BC, prompts)
            yield new
            if interval_s is not None:
                steps = max(1, min(CHUNK, int(interval_s / (elapsed_s / steps))))

    def compile(self, prompts: Sequence[Prompt]) -> None:
        """Compile what `generate` runs for these prompts, where it is new."""
        inputs, run = self._begin(prompts, seed=0)
        if max(prompt.max_new_tokens for prompt in prompts) > 1:
            rows, _ = run.out_info
            self._decode(rows, inputs[-1])

    def _begin(self, prompts: Sequence[Prompt], seed: int) -> tuple[tuple, Any]:
        """Return the arguments of the prefill besides the model, and its program."""
        longest = max(len(prompt.ids) for prompt in prompts)
        max_new_tokens = max(prompt.max_new_tokens for prompt in prompts)
        slots = kv.prompt_slots(longest, max_seq_len=self._model.config.max_seq_len)
        all_slots = slots + kv.bucket(max_new_tokens, least=kv.LEAST_SLOTS)
        inputs = self._inputs(prompts, slots, np.uint32(seed))
        attention = self._loaded.attention(slots)
        for line in attention.warnings():
            self._warn(line)
        key = ("prefill", len(inputs[1]), slots, all_slots)
        arguments = (self._model, *inputs)
        return inputs, self._program(key, prefill, attention.impl, arguments, slots=all_slots)

    def _inputs(self, prompts: Sequence[Prompt], slots: int, seed: np.uint32) -> tuple:
        """Arguments of the prefill besides the model; rows that are no prompt fill up the batch."""
        shards = sharding.batch_shards(self._mesh)
        size = shards * kv.bucket(-(-len(prompts) // shards))
        tokens, lengths = np.zeros((size, slots), np.int32), np.ones(size, np.int32)
        numbers, running = np.zeros(size, np.int32), np.zeros(size, bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.ids)] = prompt.ids
            lengths[row], numbers[row], running[row] = len(prompt.ids), prompt.number, True
        rows = NamedSharding(self._mesh, sharding.spec("B", sharding.ACTIVATIONS, self._mesh))
        return *jax.device_put((tokens, lengths, numbers, running), rows), seed

    def _decode(self, rows: Any, seed: np.uint32) -> Callable:
        return self._program(
            ("decode", len(rows.tokens_B), rows.cache.k_LBKSH.shape[3]),
            decode,
            "xla",  # one query a row: no kernel is made for that
            (self._model, rows, seed, np.int32(CHUNK)),
            chunk=CHUNK,
        )

    def _program(
        self, key: tuple, step: Callable, attention: str, arguments: tuple, **sizes: int
    ) -> Callable:
        """The program of this key, compiled for the shapes of `arguments` when it is new."""
        if key not in self.programs:
            start = time.perf_counter()
            dtype = jnp.dtype(self._loaded.dtype)
            compute = Compute(dtype=dtype, remat="none", attention=attention, loss_chunk_tokens=1)
            made = step(self._mesh, self._model, compute, self._sampling, self._stop_ids, **sizes)
            self.programs[key] = made.lower(*arguments).compile()
            self.times.compile_s += time.perf_counter() - start
            for line in undonated_warnings(self.programs[key], "decoding", "cache"):
                self._warn(line)
        return self.programs[key]


def _to_host(x: jax.Array) -> np.ndarray:
    """Return the whole of an array, on all processes where it is split over several."""
    return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))


def _append(new: list[list[int]], tokens_BC: np.ndarray, prompts: Sequence[Prompt]) -> None:
    """Append the tokens of each row, as far as its prompt wants more."""
    for ids, row, prompt in zip(new, tokens_BC.tolist(), prompts, strict=True):
        room = prompt.max_new_tokens - len(ids)
        ids += [i for i in row if i != NOTHING][:room]
