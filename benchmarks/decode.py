"""Prints how fast text is generated here: decoding speed and time to first token, as one table.

    python benchmarks/decode.py --preset=smollm2-135m --batch=1 --prompt_len=128 --new_tokens=64
    python benchmarks/decode.py --preset=tiny --batch=8 --backend=cpu --num_cpu_devices=8 \
        --mesh=fsdp=4,tensor=2

The engine is that of `llamajax.generate`, greedy, without stop tokens; weights and prompts are
random. Compiling is done before anything is timed. With `--transformers`, its `generate` does the
same with a random model of the same sizes, alternating with ours.
"""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from train_step import memory_peaks, peak_memory, two_columns  # the script beside this one

from llamajax.config import MachineFlags, find_preset, key, mesh_config, parse_command_line
from llamajax.config.schema import ComputeDtype, ModelConfig
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeFlags(MachineFlags):
    """Flags of this script."""

    preset: str = key("one of llamajax.config.PRESETS", default="quickstart")
    batch: int = key("prompts at a time", default=1, at_least=1)
    prompt_len: int = key("tokens a prompt", default=128, at_least=1)
    new_tokens: int = key("tokens that follow each; the second is decoded", default=64, at_least=2)
    rounds: int = key("generations that are timed", default=5, at_least=1)
    dtype: ComputeDtype | None = key("as in llamajax.generate", default=None)
    transformers: bool = key("time it beside ours", default=False)
    seed: int = key("of weights and prompts", default=0)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        model = find_preset(self.preset)
        if self.prompt_len + self.new_tokens > model.max_seq_len:
            yield (
                f"--prompt_len={self.prompt_len} and --new_tokens={self.new_tokens} are more than "
                f"the {model.max_seq_len} tokens of {model.name}"
            )


class Round(NamedTuple):
    """One generation: seconds to the first new tokens of all rows, and for all that follow."""

    first_s: float
    rest_s: float


def random_model(config: ModelConfig, mesh: Any, dtype: Any, *, seed: int) -> Any:
    """A model of random weights, born sharded, in the dtypes that a checkpoint is loaded in."""
    import jax

    from llamajax.models.abstract import abstract_model
    from llamajax.models.llama import Llama

    wanted = abstract_model(config, mesh, dtype=dtype)

    def init(key: jax.Array) -> Llama:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), Llama(config, key), wanted)

    placed = jax.tree.map(lambda x: x.sharding, wanted)
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))


def random_prompts(config: ModelConfig, flags: DecodeFlags) -> Any:
    """Token ids (B, T), a function of the seed."""
    import numpy as np

    shape = (flags.batch, flags.prompt_len)
    return np.random.default_rng(flags.seed).integers(config.vocab_size, size=shape)


def ours(config: ModelConfig, mesh: Any, machine: Any, dtype: str, flags: DecodeFlags):
    """The engine with a random model, and a function that generates once."""
    import jax.numpy as jnp

    from llamajax.decoding.engine import Engine
    from llamajax.decoding.generate_options import Sampling
    from llamajax.decoding.prompts import Prompt
    from llamajax.formats.load_model import LoadedModel

    model = random_model(config, mesh, jnp.dtype(dtype), seed=flags.seed)
    loaded = LoadedModel(machine=machine, mesh=mesh, dtype=dtype, model=model)
    engine = Engine(loaded, sampling=Sampling(temperature=0.0), stop_ids=())
    ids = random_prompts(config, flags).tolist()
    prompts = [Prompt(number, row, flags.new_tokens) for number, row in enumerate(ids)]

    def generate() -> Round:
        before = engine.times.prefill_s, engine.times.decode_s
        for _ in engine.generate(prompts, seed=flags.seed):
            pass
        return Round(engine.times.prefill_s - before[0], engine.times.decode_s - before[1])

    return engine, generate


def theirs(config: ModelConfig, dtype: str, flags: DecodeFlags) -> Callable[[], Round]:
    """The same by transformers on the CPU."""
    import torch
    from versus_systems import transformers_llama  # the script beside this one

    torch.manual_seed(flags.seed)
    model = transformers_llama(dataclasses.asdict(config)).to(getattr(torch, dtype)).eval()
    ids = torch.tensor(random_prompts(config, flags))

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        return time.perf_counter() - start

    def generate() -> Round:
        first_s = seconds(1)
        return Round(first_s, seconds(flags.new_tokens) - first_s)

    return generate


def measured(rounds: list[Round], flags: DecodeFlags) -> tuple[str, str]:
    """Decoding speed and time to first token, medians with the best."""
    tokens = flags.batch * (flags.new_tokens - 1)
    speeds = [tokens / r.rest_s for r in rounds]
    firsts = [1e3 * r.first_s for r in rounds]
    speed = f"{statistics.median(speeds):,.1f} (best {max(speeds):,.1f})"
    return speed, f"{statistics.median(firsts):,.0f} ms (best {min(firsts):,.0f})"


def main(argv: list[str]) -> None:
    """Measure and print."""
    flags = parse_command_line(argv, DecodeFlags, verb="benchmarks/decode.py", doc=__doc__)
    config = find_preset(flags.preset)
    import jax

    from llamajax import backends, sharding
    from llamajax.decoding.generator import default_mesh
    from llamajax.models.counts import num_parameters

    machine = backends.start(flags.backend_config)
    chosen = default_mesh(config, machine.num_devices)
    mesh_wanted = mesh_config(flags.mesh) if flags.mesh else chosen
    mesh = sharding.build_mesh(mesh_wanted, jax.devices())
    sharding.check_divides(config.dims, mesh, batch=sharding.batch_shards(mesh))
    dtype = flags.dtype or backends.platform_facts(machine.platform).dtype
    engine, generate = ours(config, mesh, machine, dtype, flags)
    reference = theirs(config, dtype, flags) if flags.transformers else None
    generate(), reference and reference()  # compiles; touches all memory once
    rounds, reference_rounds = [], []
    for _ in range(flags.rounds):
        rounds.append(generate())
        if reference:
            reference_rounds.append(reference())
    speed, first = measured(rounds, flags)
    rows = {
        "model": f"{config.name}, {num_parameters(config):,} parameters, random",
        "machine": f"{machine.platform}, {machine.device_kind}, {sharding.describe(mesh)}",
        "date, versions": f"{datetime.date.today()}, jax {machine.versions['jax']}",
        "work": f"{flags.batch} prompts of {flags.prompt_len} tokens, {flags.new_tokens} new ones "
        f"each, {dtype}, median of {flags.rounds} rounds",
        "decoding, tokens/s": speed,
        "time to first token": first,
        "compiling": f"{engine.times.compile_s:.1f} s for {len(engine.programs)} programs",
        "peak memory": peak_memory(memory_peaks()),
    }
    if reference:
        speed, first = measured(reference_rounds, flags)
        rows |= {"transformers, tokens/s": speed, "transformers, time to first token": first}
    print(two_columns(rows))


if __name__ == "__main__":
    run_verb(main)
