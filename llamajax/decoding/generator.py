"""The work of `generate`: open, check and load a model, then continue prompts."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from llamajax.config.schema import MeshConfig, ModelConfig
from llamajax.data import Tokenizer
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import GenerateOptions
from llamajax.decoding.prompts import Prompt, as_prompt, eos_ids, read_prompts, text_ids
from llamajax.errors import UserError, say
from llamajax.formats.load_model import load_model
from llamajax.formats.weights import Weights, open_weights
from llamajax.tokenizers import chat
from llamajax.tokenizers.tokenizer_identity import check_vocabulary

_STREAM_INTERVAL_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """A loaded model, and the prompts that were given (none when they are typed)."""

    options: GenerateOptions
    model: ModelConfig
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    engine: Engine
    prompts: list[Prompt]

    def typed(self, text: str, *, number: int) -> Prompt:
        """The prompt of a line that somebody typed. Raises UserError when it is too long."""
        ids = text_ids(text, self.tokenizer, self.options.chat_template)
        max_new_tokens = self.options.max_new_tokens
        return as_prompt(ids, self.model, max_new_tokens, number=number, name="this prompt")

    def batches(self) -> Iterator[list[Prompt]]:
        """Yield the given prompts, `batch_size` at a time."""
        for start in range(0, len(self.prompts), self.options.batch_size):
            yield self.prompts[start : start + self.options.batch_size]

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[list[list[int]]]:
        """Yield all new tokens of each prompt so far, whenever there are more: the same lists."""
        is_watched = not self.options.json and self.options.prompts_file is None
        interval_s = _STREAM_INTERVAL_S if is_watched else None
        return self.engine.generate(prompts, seed=self.options.seed, interval_s=interval_s)

    def summary(self) -> str:
        """Speed so far, for people."""
        t = self.engine.times
        parts = [f"first token after {t.prefill_s / t.batches:.2f} s"]
        if t.decode_tokens:
            speed = t.decode_tokens / t.decode_s
            parts.append(f"then {speed:.1f} tokens/s ({t.decode_tokens} in {t.decode_s:.2f} s)")
        programs = len(self.engine.programs)
        parts.append(f"compiling {programs} programs took {t.compile_s:.1f} s besides")
        return ", ".join(parts)


def open_generator(options: GenerateOptions) -> Generator:
    """Do everything up to the first token. Raises UserError for what a user can fix."""
    sampling = options.sampling
    if sampling.temperature == 0 and (sampling.top_k, sampling.top_p) != (None, None):
        say("warning: --top_k and --top_p have no effect at --temperature=0; set one above 0")
    weights = open_weights(options.checkpoint)
    config = weights.model
    tokenizer = _tokenizer(options, weights)
    if options.interactive:
        text_ids("", tokenizer, options.chat_template)  # refuses a checkpoint without one
    is_plain = options.prompt_ids is None and options.chat_template == "none"
    if tokenizer is not None and tokenizer.facts.chat_template and is_plain:
        say(
            "note: prompts are continued as they are; --chat_template=model puts them into the "
            "model's own chat template"
        )
    prompts = [] if options.interactive else read_prompts(options, config, tokenizer)
    stop_ids = _stop_ids(options, weights, tokenizer)
    loaded = load_model(weights, options, default_mesh=default_mesh)
    say(f"compute  {loaded.dtype}")
    return Generator(
        options=options,
        model=config,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        engine=Engine(loaded, sampling=sampling, stop_ids=stop_ids),
        prompts=prompts,
    )


def default_mesh(model: ModelConfig, num_devices: int) -> MeshConfig:
    """Split the model over as many devices along `tensor` as divide it, and copy it along `data`.

    Devices along `tensor` share the work of each token.
    """
    tensor = math.gcd(num_devices, *(model.dims[d] for d in "KNFV"))
    return MeshConfig(tensor=tensor, data=num_devices // tensor)


def _tokenizer(options: GenerateOptions, weights: Weights) -> Tokenizer | None:
    """Load the model's tokenizer. UserError where it does not fit, but for ids, which need none."""
    try:
        tokenizer = weights.load_tokenizer()
        check_vocabulary(tokenizer, weights.model.vocab_size)
        return tokenizer
    except UserError as error:
        if options.prompt_ids is None:
            raise
        say(f"warning: the ids are continued without a tokenizer: {error}")
        return None


def _stop_ids(
    options: GenerateOptions, weights: Weights, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    size = weights.model.vocab_size
    if wrong := [i for i in options.stop_ids if not 0 <= i < size]:
        raise UserError(f"--stop_ids: {wrong[0]} is outside the model's vocabulary, 0..{size - 1}")
    ends = () if options.ignore_eos else eos_ids(weights.path, tokenizer)
    if ends and tokenizer is not None and options.chat_template not in ("none", chat.OWN_TEMPLATE):
        ends = (*ends, *chat.stop_ids(tokenizer, options.chat_template))
    return tuple(sorted({*options.stop_ids, *ends}))
