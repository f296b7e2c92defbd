"""The work of `evaluate`: open, check and load, then score and write."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.errors import UserError, say
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.row_sources import RowSource, open_rows
from llamajax.evaluation.scorer import load_for_scoring, result_facts, score_rows
from llamajax.evaluation.scoring import Score, perplexity
from llamajax.files import replaced_file
from llamajax.formats.weights import open_weights


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Score the rows and return the result as the verb prints it; write per-token losses if asked.

    To be called by all processes. Raises UserError for what a user can fix.
    """
    if options.harness is not None:
        if options.harness_tasks is not None and not Path(options.harness_tasks).is_dir():
            raise UserError(f"--harness_tasks={options.harness_tasks}: there is no such directory")
        try:
            from llamajax.evaluation.harness import run_harness
        except ImportError as error:
            raise UserError(
                f"--harness needs lm-evaluation-harness ({error}): pip install 'llamajax[harness]'"
            ) from error
        return run_harness(options)
    weights = open_weights(options.checkpoint)
    source = open_rows(options, weights)
    loaded = load_for_scoring(options, weights)
    stride = "" if source.stride is None else f", stride {source.stride}"
    longest = f"at most {source.seq_len} tokens"
    say(f"rows     {source.rows.num_rows} of {longest}, {source.protocol}{stride}")
    keep = options.per_token_nll is not None
    found = score_rows(loaded, source.rows, options, keep=keep or source.tasks is not None)
    if keep and loaded.machine.is_primary:
        out, label = Path(options.per_token_nll), f"--per_token_nll={options.per_token_nll}"
        with replaced_file(out, label=label) as hidden, hidden.open("wb") as file:
            np.save(file, found.per_token.reshape(source.shape or (1, -1)))
    result = _result(source, found) if source.tasks is None else _task_result(source, found)
    return result | result_facts(loaded, weights, source.rows.seq_len)


def _result(source: RowSource, found: Score) -> dict[str, Any]:
    """Loss and what follows from it; bits per byte only where all of the text was scored."""
    if not found.tokens:
        raise UserError("none of the tokens read is a target: raise --max_batches")
    loss = found.nll / found.tokens
    num_bytes = source.num_bytes if found.num_rows == source.rows.num_rows else None
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": num_bytes and found.nll / math.log(2) / num_bytes,
        "tokens": found.tokens,
        "bytes": num_bytes,
        "protocol": source.protocol,
        "seq_len": source.seq_len,
        "stride": source.stride,
        **source.facts,
    }


def _task_result(source: RowSource, found: Score) -> dict[str, Any]:
    """Loss and what follows from it of the right choices of all tasks, and each task's figures."""
    tasks = source.tasks.results(source.rows.sums(found)[0])
    tokens = sum(figures["tokens"] for figures in tasks.values())
    nll = sum(figures["loss"] * figures["tokens"] for figures in tasks.values())
    num_bytes = sum(figures["bytes"] for figures in tasks.values())
    right = dataclasses.replace(source, num_bytes=num_bytes)
    return _result(right, found._replace(nll=nll, tokens=tokens)) | {"tasks": tasks}
