"""Where rows go besides `metrics.jsonl`: TensorBoard, Weights & Biases.

Each sink has a thread and a bounded queue, so that one that is slow or fails never delays a step.
Rows that it did not get are counted: in one warning, and as `sink_dropped_rows` in later rows.
"""

import contextlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llamajax.errors import UserError, say
from llamajax.monitoring.jsonl import is_evaluation, plain_number

_MOST_WAITING = 4096  # rows
_CLOSE_WITHIN_S = 10.0  # all sinks together
PERF = (
    "time_s", "step_time_s", "data_wait_s", "tokens_per_s", "mfu_full", "mfu_causal",
    "memory_bytes", "peak_memory_bytes",
)  # fmt: skip
_GUARD = ("skipped_updates", "update_skipped", "split_attention", "failed_checkpoints")
_GROUP_OF = dict.fromkeys(PERF, "perf") | dict.fromkeys(_GUARD, "guard")


class Sink(Protocol):
    """What a sink does, always in its own thread. Any error ends it with a warning."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag, `train/loss`; those of an earlier step replace what was there."""

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Write a text."""

    def close(self) -> None:
        """Write what is left."""


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by tag: train/, eval/, perf/, guard/, norms/.

    Of one number a device it is the largest. A skipped update is 1.
    """
    found, evaluated = {}, is_evaluation(row)
    for name, value in row.items():
        number = plain_number(max(value) if isinstance(value, list) and value else value)
        if name == "update_skipped":
            number = 1
        if name == "step" or not isinstance(number, int | float):
            continue
        group = "eval" if evaluated else "" if "/" in name else _GROUP_OF.get(name, "train")
        tag = name.removeprefix("eval_") if evaluated else name
        found[f"{group}/{tag}" if group else tag] = number
    return found


class SinkThread:
    """Passes rows to a sink in a thread of its own, which also opens it."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open = name, open_sink
        self._offered = self._refused = self._written = 0  # rows and texts
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._warned = self._over = False
        self._thread = threading.Thread(target=self._run, name=f"sink_{name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Rows and texts that the sink did not get, as far as is known."""
        return self._offered - self._written if self._over else self._refused

    def write(self, row: Mapping[str, Any]) -> None:
        """Enter a row; returns at once."""
        self._enter(("write", tagged(row), int(row["step"])))

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Enter a text; returns at once."""
        self._enter(("write_text", tag, text, step))

    def end(self) -> None:
        """Let the sink close behind the rows that were entered; returns at once."""
        self._waiting.put(None)

    def wait(self, within_s: float) -> None:
        """Wait until it has closed, but not longer than that."""
        self._thread.join(within_s)
        if self._thread.is_alive():
            self._over = True
            self._warn(f"did not take its last rows within {_CLOSE_WITHIN_S:.0f} s")

    def _enter(self, call: tuple) -> None:
        self._offered += 1
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(call)
        elif not self._over:
            self._refused += 1
            self._warn(f"is slow: {_MOST_WAITING} rows wait for it, and it does not get later ones")

    def _run(self) -> None:
        with self, contextlib.closing(self._open()) as sink:
            while call := self._waiting.get():
                method, *values = call
                getattr(sink, method)(*values)
                self._written += 1

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Turn an error of the sink, whatever it is, into a warning."""
        if error is not None:
            self._over = True
            self._warn(f"is no longer written: {str(error) or type(error).__name__}")
        return True

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            say(f"warning: monitoring.sinks: {self._name} {problem}; training goes on")


def close_sinks(sinks: Sequence[SinkThread]) -> None:
    """Wait for the rows that were entered, but not long: one that hangs takes no other's time."""
    for sink in sinks:
        sink.end()
    end_s = time.monotonic() + _CLOSE_WITHIN_S
    for sink in sinks:
        sink.wait(max(0.0, end_s - time.monotonic()))


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError where a sink needs a package that is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "monitoring.sinks: wandb needs a package that is not installed: "
            "pip install 'llamajax[wandb]', or leave it out"
        )


def open_sinks(
    names: Sequence[str], workdir: Path, *, after_step: int, config: Mapping[str, Any]
) -> list[SinkThread]:
    """Open sinks by name; `jsonl`, which is always written, is none of them.

    after_step: points after this step, of earlier processes, are replaced. config: of the run, as
    JSON.
    """
    made: dict[str, Callable[[], Sink]] = {}
    if "tensorboard" in names:
        from llamajax.monitoring.tensorboard import TensorBoard, imported

        imported()  # here and not in the thread: see there
        made["tensorboard"] = lambda: TensorBoard(workdir, after_step=after_step, config=config)
    if "wandb" in names:
        from llamajax.monitoring.weights_and_biases import WeightsAndBiases

        made["wandb"] = lambda: WeightsAndBiases(workdir, config=config)
    return [SinkThread(name, open_sink) for name, open_sink in made.items()]
