"""One session of `generate`: what is opened, checked and loaded, in that order; then answers."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.config.flags import mesh_config
from llamajax.config.schema import MeshConfig, ModelConfig
from llamajax.data import Tokenizer
from llamajax.decoding.engine import Engine, attention_chooser
from llamajax.decoding.generate_options import GenerateOptions, check_options
from llamajax.decoding.prompts import Prompt, as_prompt, eos_ids, read_prompts, text_ids
from llamajax.errors import UserError, say
from llamajax.formats.weights import Weights, open_weights
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.monitoring.progress import format_count
from llamajax.tokenizers import chat
from llamajax.tokenizers.tokenizer_identity import check_vocabulary, load_recorded

STREAM_INTERVAL_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """A model that is ready, and the prompts that were given (none when they are typed)."""

    request: GenerateOptions
    model: ModelConfig
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    engine: Engine
    prompts: list[Prompt]

    def typed(self, text: str, *, number: int) -> Prompt:
        """The prompt of a line that somebody typed. UserError when it is too long."""
        ids = text_ids(text, self.tokenizer, self.request.chat_template)
        return as_prompt(
            ids, self.model, self.request.max_new_tokens, number=number, name="this prompt"
        )

    def batches(self) -> Iterator[list[Prompt]]:
        """The given prompts, as many at a time as were asked for."""
        for start in range(0, len(self.prompts), self.request.batch_size):
            yield self.prompts[start : start + self.request.batch_size]

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[list[list[int]]]:
        """The next new tokens of each prompt, until all are complete."""
        interval_s = STREAM_INTERVAL_S if self.request.streams else None
        total = [0] * len(prompts)
        for update in self.engine.generate(prompts, seed=self.request.seed, interval_s=interval_s):
            yield [
                ids[: max(0, prompt.max_new_tokens - n)]
                for ids, prompt, n in zip(update, prompts, total, strict=True)
            ]
            total = [n + len(ids) for n, ids in zip(total, update, strict=True)]

    def summary(self) -> str:
        """What is known of the speed so far, for people."""
        t = self.engine.times
        parts = [f"first token after {t.prefill_s / t.batches:.2f} s"]
        if t.decode_tokens:
            speed = t.decode_tokens / t.decode_s
            parts.append(f"then {speed:.1f} tokens/s ({t.decode_tokens} in {t.decode_s:.2f} s)")
        programs = len(self.engine.programs)
        parts.append(f"compiling {programs} programs took {t.compile_s:.1f} s besides")
        return ", ".join(parts)


def open_generator(request: GenerateOptions) -> Generator:
    """Everything up to the first token. UserError for what a user can mend."""
    check_options(request)
    sampling = request.sampling
    if sampling.temperature == 0 and (sampling.top_k, sampling.top_p) != (None, None):
        say("warning: --top_k and --top_p have no effect at --temperature=0; set one above 0")
    weights = open_weights(request.checkpoint)
    tokenizer = _tokenizer(request, weights)
    if request.interactive:
        text_ids("", tokenizer, request.chat_template)  # refuses a checkpoint without one
    prompts = [] if request.interactive else read_prompts(request, weights.model, tokenizer)
    stop_ids = _stop_ids(request, weights, tokenizer)
    machine = backends.start(request.backend, keep_programs=True)
    mesh = _mesh(request, weights.model)
    dtype = request.dtype or default_dtype(machine)
    sharding.check_divides(
        weights.model.dims, mesh, batch=sharding.batch_shards(mesh), accumulation=1
    )
    _greet(weights, machine, mesh, dtype)
    model = weights.load(abstract_model(weights.model, mesh, dtype=jnp.dtype(dtype)))

    engine = Engine(
        model,
        mesh,
        dtype=jnp.dtype(dtype),
        attention=attention_chooser(machine, weights.model, dtype),
        sampling=request.sampling,
        stop_ids=stop_ids,
    )
    return Generator(
        request=request,
        model=weights.model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        engine=engine,
        prompts=prompts,
    )


def default_dtype(machine: backends.Machine) -> str:
    """Of weights, computation and cache."""
    return backends.platform_facts(machine.platform).dtype


def default_mesh(model: ModelConfig, num_devices: int) -> MeshConfig:
    """As many devices as divide the model along `tensor`, which share each token's work; replicas
    of that along `data`."""
    sizes = (model.dims[d] for d in "KNFV")
    tensor = math.gcd(num_devices, *sizes)
    return MeshConfig(tensor=tensor, data=num_devices // tensor)


def _mesh(request: GenerateOptions, model: ModelConfig) -> Mesh:
    devices = jax.devices()
    if request.mesh is None:
        return sharding.build_mesh(default_mesh(model, len(devices)), devices)
    config = mesh_config(request.mesh, rest="tensor")
    return sharding.build_mesh(config, devices)


def _tokenizer(request: GenerateOptions, weights: Weights) -> Tokenizer | None:
    """Load the model's tokenizer. UserError where it does not fit, but for ids, which need none."""
    try:
        tokenizer = load_recorded(weights.tokenizer, weights.tokenizer_record, of=weights.path)
        check_vocabulary(tokenizer, weights.model.vocab_size)
        return tokenizer
    except UserError as error:
        if request.prompt_ids is None:
            raise
        say(f"warning: the ids are continued without a tokenizer: {error}")
        return None


def _stop_ids(
    request: GenerateOptions, weights: Weights, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    size = weights.model.vocab_size
    if wrong := [i for i in request.stop_ids if not 0 <= i < size]:
        raise UserError(f"--stop_ids: {wrong[0]} is outside the model's vocabulary, 0..{size - 1}")
    ends = () if request.ignore_eos else eos_ids(weights.path, tokenizer)
    if ends and tokenizer is not None and request.chat_template != "none":
        ends = (*ends, *chat.stop_ids(tokenizer, request.chat_template))
    return tuple(sorted({*request.stop_ids, *ends}))


def _greet(weights: Weights, machine: backends.Machine, mesh: Mesh, dtype: str) -> None:
    step = "" if weights.step is None else f" of step {weights.step}"
    for line in (
        f"weights  {weights.path} ({weights.kind}{step}), "
        f"{format_count(num_parameters(weights.model))} parameters",
        f"machine  {machine.platform}, {machine.device_kind}; mesh {sharding.describe(mesh)}",
        f"compute  {dtype}",
    ):
        say(line)
