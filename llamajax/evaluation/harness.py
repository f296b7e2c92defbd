"""Tasks of EleutherAI's lm-evaluation-harness, computed with llamajax; needs the extra `harness`.

Importing this file registers the model `llamajax` with the harness (0.4.13). All processes of a run
compute each request together, so that each of them has all results.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from lm_eval import evaluator, tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llamajax import sharding
from llamajax.backends import keep_harness_from_forking
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.prompts import Prompt, eos_ids
from llamajax.errors import UserError, say
from llamajax.evaluation.continuations import Continuation, ContinuationRows, packed_length
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.row_sources import context_length, needed_tokenizer
from llamajax.evaluation.scorer import load_for_scoring, result_facts, score_rows
from llamajax.formats.weights import open_weights
from llamajax.monitoring.jsonl import plain_number

_PROMPTS_A_DEVICE = 8
# What a task may ask of generation; other keys would change its numbers and are refused.
_GENERATION = {"until", "do_sample", "temperature", "max_gen_toks", "top_k", "top_p"}


@register_model("llamajax")
class HarnessModel(TemplateLM):
    """Weights of any kind that llamajax reads, as the harness wants a model."""

    def __init__(self, *, device: None = None, max_batch_size: None = None, **flags: Any) -> None:
        """Load the weights. flags: of `evaluate`, as text or values: checkpoint, dtype, mesh, ...

        device, max_batch_size: what the harness passes to every model; of no use here.
        """
        super().__init__()
        keep_harness_from_forking()
        options = EvaluateOptions(**flags)
        self.weights = open_weights(options.checkpoint)
        self._tokenizer = needed_tokenizer(options, self.weights)
        self.max_length = context_length(options, self.weights)
        self.options, self.loaded = options, load_for_scoring(options, self.weights)
        self.scored_tokens = 0
        self._engines: dict[Sampling, Engine] = {}

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos_id = self._tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """An identity of the tokenizer, for the harness's cache of requests."""
        return f"llamajax-{self._tokenizer.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text; a BOS comes first where texts of the tokenizer have one."""
        first = [] if add_special_tokens is False else self._tokenizer.start_ids
        return [*first, *self._tokenizer.encode(string)]

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list:
        """Return log-likelihood and greediness of (texts, context ids, continuation ids)."""
        if not requests:
            return []
        found, limit = [], self.max_length + 1
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"--harness: the continuation {str(texts)[-60:]!r} has {len(continuation)} "
                    f"tokens; it must have between 1 and {self.max_length}, the context"
                )
            ids = np.array([*context, *continuation], np.int32)
            found.append(Continuation(ids[-limit:], len(continuation), len(ids) > limit))
        if num_cut := sum(each.is_cut for each in found):
            say(f"warning: the first tokens of {num_cut} of {len(found)} requests are left out")
        rows = ContinuationRows(found, packed_length(found, at_most=self.max_length))
        score = score_rows(self.loaded, rows, self.options, keep=True)
        self.scored_tokens += score.tokens
        nll, greedy = rows.sums(score)
        return list(zip((-nll).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, read in windows that share one token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        logs = [log for log, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owners, weights=logs, minlength=len(requests)).tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the first of its stop texts."""
        groups: dict[Sampling, list[tuple[Prompt, list[str]]]] = {}
        for number, request in enumerate(requests):
            context, given = request.args
            wanted = normalize_gen_kwargs(given)
            if unknown := sorted({*wanted} - _GENERATION):
                raise UserError(f"--harness: a task generates with {unknown}, unknown here")
            room = self.max_length - wanted["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"--harness: a task generates {wanted['max_gen_toks']} tokens; the context of "
                    f"{self.max_length} has no room for a prompt"
                )
            sampling = Sampling(
                temperature=wanted.get("temperature", 0.0),
                top_k=wanted.get("top_k"),
                top_p=wanted.get("top_p"),
            )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            prompt = Prompt(number, ids, wanted["max_gen_toks"])
            groups.setdefault(sampling, []).append((prompt, wanted["until"]))
        texts = [""] * len(requests)
        size = _PROMPTS_A_DEVICE * sharding.batch_shards(self.loaded.mesh)
        for sampling, prompts in groups.items():
            prompts.sort(key=lambda each: -len(each[0].ids))
            for start in range(0, len(prompts), size):
                for number, text in self._generate(sampling, prompts[start : start + size]):
                    texts[number] = text
        return texts

    def _generate(
        self, sampling: Sampling, prompts: Sequence[tuple[Prompt, list[str]]]
    ) -> list[tuple[int, str]]:
        """Return the number of each prompt and its text; end when every text has ended."""
        stop_ids = tuple(eos_ids(self.weights.path, self._tokenizer))
        if sampling not in self._engines:
            self._engines[sampling] = Engine(self.loaded, sampling=sampling, stop_ids=stop_ids)
        engine = self._engines[sampling]
        for new in engine.generate([prompt for prompt, _ in prompts], seed=0):
            kept = [[i for i in ids if i not in stop_ids] for ids in new]
            texts = [self._tokenizer.decode(ids) for ids in kept]
            if all(
                prompt.is_complete(ids, stop_ids) or any(stop and stop in text for stop in until)
                for (prompt, until), ids, text in zip(prompts, new, texts, strict=True)
            ):
                break
        return [
            (prompt.number, postprocess_generated_text(text, until, None))
            for (prompt, until), text in zip(prompts, texts, strict=True)
        ]


def run_harness(options: EvaluateOptions) -> dict[str, Any]:
    """Run the tasks of --harness, and return the result as the verb prints it."""
    manager = tasks.TaskManager(include_path=options.harness_tasks)
    try:
        manager.load(list(options.harness))
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"--harness={','.join(options.harness)}: {error}") from error
    model = HarnessModel(**vars(options))
    found = evaluator.simple_evaluate(
        model,
        tasks=list(options.harness),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=False,
    )
    figures = {
        name: {key: _json_value(value) for key, value in row.items() if "," in key}
        for name, row in (found["results"] | found.get("groups", {})).items()
    }
    fixed = {"loss": None, "perplexity": None, "tokens": model.scored_tokens}
    facts = result_facts(model.loaded, model.weights, model.max_length)
    return fixed | {"protocol": "harness", "tasks": figures} | facts


def _json_value(value: Any) -> Any:
    """Return a figure as JSON has it: no NaN, no NumPy."""
    value = plain_number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
