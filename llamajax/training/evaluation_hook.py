"""Evaluations: losses of the validation sets in a row of `metrics.jsonl`, and `samples.jsonl`."""

import math
from typing import Any

import jax
import numpy as np

from llamajax.config import RunConfig
from llamajax.data import Mixture
from llamajax.data.packing import EXAMPLES, WINDOWS
from llamajax.decoding.printed_texts import TextStream
from llamajax.evaluation.continuations import ContinuationRows
from llamajax.evaluation.scoring import perplexity, score
from llamajax.models.llama import Llama
from llamajax.monitoring import MetricsWriter
from llamajax.monitoring.metrics import SAMPLES
from llamajax.training.attempt import Attempt
from llamajax.training.feed import eval_batch_size, eval_batches
from llamajax.training.hooks import Hook
from llamajax.training.state import TrainState

_SHOWN, _SHOWN_CHARACTERS = 3, 90  # of samples, on the terminal


class EvaluateHook(Hook):
    """Writes the row of an evaluation; no row where a stop signal comes meanwhile.

    Samples come after the row, so that decoding that fails costs neither the row nor a resume.
    """

    def __init__(self, attempt: Attempt):
        super().__init__(attempt)
        self._inputs = self.run.setup.evaluated
        self._samples = MetricsWriter(
            self.run.workdir,
            file=SAMPLES,
            resume_step=attempt.start.step,
            primary=self.run.is_primary and bool(self._inputs.prompts),
        )

    def is_due(self, step: int, stop: bool) -> bool:
        return not stop and self.run.setup.evaluates_after(step)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        """Evaluate the state. Lets `Interrupted` through, which a stop signal raises."""
        a, inputs, row = self.attempt, self._inputs, {"step": step}
        with a.phase("evaluation", step) as fields:
            if inputs.sets:
                row |= self._held_out_losses(step, state)
            if inputs.tasks is not None:
                row |= self._task_accuracies(step, state)
            if len(row) > 1:
                fields |= {name: row[name] for name in row if name.startswith("eval_loss")}
                row["time_s"] = a.run.events.time_s
                a.metrics.write(row)
                a.progress.show(row)
            if inputs.prompts:
                self._write_samples(step, self._new_ids(step, state))

    def _held_out_losses(self, step: int, state: TrainState) -> dict[str, Any]:
        """Return the mean loss of the targets of each validation set, in nats, and what follows.

        `eval_loss` is of the run's own validation split; without one, of all targets of the named
        sets. Those of a named set end in `/NAME`. Bits per byte are null where not all text was
        scored.
        """
        models = [state.whole] if state.average is None else [state.whole, state.averaged]
        config, sets = self.run.setup.at(step).config, self._inputs.sets
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
        setup, pending = self.run.setup.at(step), None
        evaluate = self.attempt.programs.at(step).evaluate
        packing = self.attempt.start.position.segment(max(step - 1, 0)).packing
        if not setup.mixture.masked and setup.config.data.packing != WINDOWS:
            packing = EXAMPLES  # of a validation set: the segment of text does not tell
        sums = np.zeros((len(models), 2), np.float64)
        for batch in eval_batches(setup.config, setup.mesh, held_out, packing=packing):
            current = [evaluate(model, batch) for model in models]
            if pending is not None:
                sums += np.array(jax.device_get(pending), np.float64)
            pending = current
            self.attempt.report_part()
        return sums + np.array(jax.device_get(pending), np.float64)

    def _task_accuracies(self, step: int, state: TrainState) -> dict[str, Any]:
        """Score the choices of `train.tasks`, in batches of the shape that evaluation has."""
        setup, tasks = self.run.setup.at(step), self._inputs.tasks
        data, size = setup.config.data, eval_batch_size(setup.config)
        rows = ContinuationRows(tasks.encoded, data.seq_len, packed=data.mask_documents)
        found = score(
            state.whole,
            rows,
            mesh=setup.mesh,
            run=self.attempt.programs.at(step).score,
            batch_size=size,
            num_batches=-(-rows.num_rows // size),
            keep=True,
            show=lambda _: self.attempt.report_part(),
        )
        results = tasks.results(rows.sums(found)[0])
        shown = ("accuracy", "accuracy_by_length", "bits_per_byte")
        return {f"task/{name}/{key}": of[key] for name, of in results.items() for key in shown}

    def _new_ids(self, step: int, state: TrainState) -> list[list[int]]:
        """Return the tokens that continue each prompt of the run.

        The random bits of a text are a function of `train.seed`, the step and the number of the
        prompt.
        """
        engine = self.attempt.programs.sampler(self.run.setup.at(step), state)
        (seed,) = np.random.SeedSequence([self.config.train.seed, step]).generate_state(1)
        for so_far in engine.generate(self._inputs.prompts, seed=int(seed)):
            self.attempt.report_part()
            new = so_far
        return new

    def _write_samples(self, step: int, new: list[list[int]]) -> None:
        """Write the texts of `new` tokens of each prompt to `samples.jsonl` and the sinks."""
        a, inputs, texts = self.attempt, self._inputs, []
        for index, ids in enumerate(new):
            stream = TextStream(inputs.tokenizer, inputs.prompts[index].ids)
            text = stream.feed(ids) + stream.finish()
            prompt = self.config.train.sample_prompts[index]
            row = {"step": step, "index": index, "prompt": prompt, "text": text}
            self._samples.write(row | {"time_s": a.run.events.time_s})
            texts.append(f"{prompt} | {text}")
            if index < _SHOWN:
                line = f"{prompt[-_SHOWN_CHARACTERS // 3 :]} | {text}"[:_SHOWN_CHARACTERS]
                shown = "".join(c if c.isprintable() else " " for c in line)  # no escape codes
                a.progress.note(f"sample   {shown}")
        a.metrics.write_text("samples", "\n\n".join(texts), step)


def _num_bytes(config: RunConfig, held_out: Mixture) -> int | None:
    """Return the bytes of the text that is scored; None if unknown."""
    sizes = [source.text_bytes for source in held_out.sources]
    if None in sizes:  # only of text, which is cut into windows
        return None
    rows = sum(s.samples(config.data.seq_len, WINDOWS).count_all for s in held_out.sources)
    batches = config.train.eval_batches
    is_all = batches is None or batches * eval_batch_size(config) >= rows
    return sum(sizes) if is_all else None


def _fields(suffix: str, sums: np.ndarray, num_bytes: int | None) -> dict[str, Any]:
    nll, count = sums.tolist()
    loss = nll / count if count else math.nan
    return {
        f"eval_loss{suffix}": loss,
        f"eval_perplexity{suffix}": perplexity(loss),
        f"eval_bits_per_byte{suffix}": num_bytes and nll / math.log(2) / num_bytes,
        f"eval_tokens{suffix}": int(count),
    }
