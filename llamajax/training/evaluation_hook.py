"""Evaluations: losses of the validation sets in a row of `metrics.jsonl`, and `samples.jsonl`."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax import sharding
from llamajax.config import ModelConfig, RunConfig
from llamajax.data import Mixture
from llamajax.data.packing import WINDOWS
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.printed_texts import TextStream
from llamajax.evaluation.continuations import ContinuationRows
from llamajax.evaluation.scoring import perplexity, score
from llamajax.models.llama import Llama
from llamajax.monitoring import MetricsWriter
from llamajax.monitoring.metrics import SAMPLES
from llamajax.ops.attention import best_attention
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.feed import eval_batch_size, eval_batches
from llamajax.training.hooks import Attempt, Hook, Interrupted
from llamajax.training.messages import samples_problem
from llamajax.training.state import TrainState

# (step, state) -> numbers of the row, whose names begin with `eval_` or `task/`. Called by all
# processes; it calls `Attempt.report_part` now and then, and lets Interrupted through.
Part = Callable[[int, TrainState], dict[str, Any]]
_SHOWN, _SHOWN_CHARACTERS = 3, 90  # of samples, on the terminal


class EvaluateHook(Hook):
    """Writes the row of an evaluation; no row where a stop signal comes meanwhile.

    Samples come after the row, so that decoding that fails costs neither the row nor a resume.
    """

    def __init__(self, attempt: Attempt):
        super().__init__(attempt)
        self.was_interrupted = False
        self._parts: list[Part] = []
        if self.run.setup.evaluated.sets:
            self._parts.append(HeldOutLosses(attempt))
        if self.run.setup.evaluated.tasks is not None:
            self._parts.append(TaskAccuracies(attempt))
        has_samples = self.run.setup.evaluated.prompts and not samples_problem(self.run.setup)
        self._samples = Samples(attempt) if has_samples else None

    def is_due(self, step: int, stop: bool) -> bool:
        every, last = self.config.train.eval_every, self.config.train.steps
        due = step == last or bool(every and step % every == 0)
        return due and not stop and bool(self._parts or self._samples)

    def was_done(self) -> bool:
        """Return whether an earlier process evaluated the step that this one resumes from."""
        return broadcast_from_first(lambda: self.attempt.start.is_evaluated)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        a, row = self.attempt, {"step": step}
        with a.phase("evaluation", step) as fields:
            try:
                for part in self._parts:
                    row |= part(step, state)
                if self._parts:
                    fields |= {name: row[name] for name in row if name.startswith("eval_loss")}
                    row["time_s"] = a.run.events.time_s
                    a.metrics.write(row)
                    a.progress.show(row)
                if self._samples:
                    self._samples.write(step, state)
            except Interrupted:
                self.was_interrupted = True


class HeldOutLosses:
    """Measures the mean loss of the targets of each validation set, in nats, and what follows.

    `eval_loss` is of the run's own validation split; without one, of all targets of the named sets.
    Those of a named set end in `/NAME`. Bits per byte are null where not all text was scored.
    """

    def __init__(self, attempt: Attempt):
        self._attempt = attempt

    def __call__(self, step: int, state: TrainState) -> dict[str, Any]:
        models = [state.whole] if state.average is None else [state.whole, state.averaged]
        setup = self._attempt.run.setup
        config, sets = setup.at(step).config, setup.evaluated.sets
        sums = {name: self._sums(step, held_out, models) for name, held_out in sets.items()}
        sizes = {name: _num_bytes(config, held_out) for name, held_out in sets.items()}
        if "" not in sets:
            sums = {"": np.sum(list(sums.values()), axis=0)} | sums
            sizes[""] = None if None in sizes.values() else sum(sizes.values())
        row: dict[str, Any] = {}
        for name, (raw, *average) in sums.items():
            row |= _fields(f"/{name}" if name else "", raw, sizes[name])
            row |= {f"ema_loss/{name}".rstrip("/"): nll / count for nll, count in average}
        return row

    def _sums(self, step: int, held_out: Mixture, models: list[Llama]) -> np.ndarray:
        """Sum the loss and the targets of each model in float64, (models, 2).

        Samples are as long as those of the stage that `step` belongs to. Batches have a fixed
        order. The last is padded, never dropped.
        """
        a, setup, pending = self._attempt, self._attempt.run.setup.at(step), None
        evaluate = a.programs.at(step).evaluate
        packing = a.start.position.segment(max(step - 1, 0)).packing
        sums = np.zeros((len(models), 2), np.float64)
        for batch in eval_batches(setup.config, setup.mesh, held_out, packing=packing):
            current = [evaluate(model, batch) for model in models]
            if pending is not None:
                sums += np.array(jax.device_get(pending), np.float64)
            pending = current
            a.report_part()
        return sums + np.array(jax.device_get(pending), np.float64)


def _num_bytes(config: RunConfig, held_out: Mixture) -> int | None:
    """Return the bytes of the text that is scored; None if unknown."""
    sizes = [source.text_bytes for source in held_out.sources]
    if None in sizes:  # only of text, which is cut into windows
        return None
    rows = sum(s.samples(config.data.seq_len, WINDOWS).count_all for s in held_out.sources)
    batches = config.train.eval_batches
    is_all = batches is None or batches * eval_batch_size(config) >= rows
    return sum(sizes) if is_all else None


class TaskAccuracies:
    """Scores the choices of `train.tasks`, in batches of the shape that evaluation has."""

    def __init__(self, attempt: Attempt):
        self._attempt = attempt

    def __call__(self, step: int, state: TrainState) -> dict[str, Any]:
        a, setup = self._attempt, self._attempt.run.setup.at(step)
        data, tasks = setup.config.data, setup.evaluated.tasks
        rows = ContinuationRows(tasks.encoded, data.seq_len, packed=data.mask_documents)
        size = eval_batch_size(setup.config)
        found = score(
            state.whole,
            rows,
            mesh=setup.mesh,
            run=a.programs.at(step).score,
            batch_size=size,
            num_batches=-(-rows.num_rows // size),
            keep=True,
            show=lambda _: a.report_part(),
        )
        results = tasks.results(rows.sums(found)[0])
        shown = ("accuracy", "accuracy_by_length", "bits_per_byte")
        return {f"task/{name}/{key}": of[key] for name, of in results.items() for key in shown}


def _fields(suffix: str, sums: np.ndarray, num_bytes: int | None) -> dict[str, Any]:
    nll, count = sums.tolist()
    loss = nll / count if count else math.nan
    return {
        f"eval_loss{suffix}": loss,
        f"eval_perplexity{suffix}": perplexity(loss),
        f"eval_bits_per_byte{suffix}": num_bytes and nll / math.log(2) / num_bytes,
        f"eval_tokens{suffix}": int(count),
    }


class Samples:
    """Continues the prompts of a run, and writes the texts to `samples.jsonl` and the sinks.

    The random bits of a text are a function of `train.seed`, the step and the number of the prompt.
    """

    def __init__(self, attempt: Attempt):
        self._attempt, self._setup = attempt, attempt.run.setup
        self._mesh = sharding.join_sequence(self._setup.mesh)  # rows are whole
        # By model: the rope scaling of a stage is a part of it.
        self._programs: dict[ModelConfig, dict[tuple, Any]] = collections.defaultdict(dict)
        run = attempt.run
        self._rows = MetricsWriter(
            run.workdir, file=SAMPLES, resume_step=attempt.start.step, primary=run.is_primary
        )

    def write(self, step: int, state: TrainState) -> None:
        """Write the samples of a step. To be called by all processes. Lets Interrupted through."""
        a, inputs, texts = self._attempt, self._setup.evaluated, []
        train = self._setup.config.train
        for index, ids in enumerate(self._new_ids(step, state)):
            stream = TextStream(inputs.tokenizer, inputs.prompts[index].ids)
            prompt, text = train.sample_prompts[index], stream.feed(ids) + stream.finish()
            row = {"step": step, "index": index, "prompt": prompt, "text": text}
            self._rows.write(row | {"time_s": a.run.events.time_s})
            texts.append(f"{prompt} | {text}")
            if index < _SHOWN:
                line = f"{prompt[-_SHOWN_CHARACTERS // 3 :]} | {text}"[:_SHOWN_CHARACTERS]
                shown = "".join(c if c.isprintable() else " " for c in line)  # no escape codes
                a.progress.note(f"sample   {shown}")
        a.metrics.write_text("samples", "\n\n".join(texts), step)

    def _new_ids(self, step: int, state: TrainState) -> list[list[int]]:
        a, setup, prompts = self._attempt, self._setup, self._setup.evaluated.prompts
        config = setup.config
        dtype = config.train.activation_dtype
        engine = Engine(
            sharding.same_parts(state.whole, self._mesh),
            self._mesh,
            dtype=jnp.dtype(dtype),
            attention=functools.partial(
                best_attention, setup.machine, dtype, config.model.head_size
            ),
            sampling=Sampling(temperature=config.train.sample_temperature),
            stop_ids=setup.evaluated.tokenizer.stop_ids,
        )
        engine.programs = self._programs[state.model.config]  # compiled at the first evaluation
        (seed,) = np.random.SeedSequence([config.train.seed, step]).generate_state(1)
        found: list[list[int]] = [[] for _ in prompts]
        a.report_alive()  # compiling has no parts
        with a.hang.paused():
            for update in engine.generate(prompts, seed=int(seed)):
                for ids, more in zip(found, update, strict=True):
                    ids += more
                a.report_part()
        return found
