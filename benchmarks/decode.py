"""Prints how fast text is generated here: decoding speed and time to first token, as one table.

    python benchmarks/decode.py --preset=smollm2-135m --batch=1 --prompt_len=128 --new_tokens=64
    python benchmarks/decode.py --preset=tiny --batch=8 --backend=cpu --num_cpu_devices=8 \
        --mesh=fsdp=4,tensor=2

The engine is that of `llamajax.generate`, greedy, without stop tokens; weights and prompts are
random. Compiling is done before anything is timed. With `--transformers`, its `generate` does the
same with a random model of the same sizes, alternating with ours.
"""

import argparse
import datetime
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from llamajax.config import PRESETS, mesh_config, preset
from llamajax.config.schema import BackendConfig, ComputeDtype, ModelConfig
from llamajax.errors import UserError
from llamajax.verbs import run_verb


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


def random_prompts(config: ModelConfig, flags: argparse.Namespace) -> Any:
    """Token ids (B, T), a function of the seed."""
    import numpy as np

    shape = (flags.batch, flags.prompt_len)
    return np.random.default_rng(flags.seed).integers(config.vocab_size, size=shape)


def ours(config: ModelConfig, mesh: Any, machine: Any, dtype: str, flags: argparse.Namespace):
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


def theirs(config: ModelConfig, dtype: str, flags: argparse.Namespace) -> Callable[[], Round]:
    """The same by transformers on the CPU."""
    import torch
    import transformers

    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_seq_len,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(flags.seed)
    model = transformers.LlamaForCausalLM(sizes).to(getattr(torch, dtype)).eval()
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


def measured(rounds: list[Round], flags: argparse.Namespace) -> tuple[str, str]:
    """Decoding speed and time to first token, medians with the best."""
    tokens = flags.batch * (flags.new_tokens - 1)
    speeds = [tokens / r.rest_s for r in rounds]
    firsts = [1e3 * r.first_s for r in rounds]
    speed = f"{statistics.median(speeds):,.1f} (best {max(speeds):,.1f})"
    return speed, f"{statistics.median(firsts):,.0f} ms (best {min(firsts):,.0f})"


def table(rows: dict[str, str]) -> str:
    """One Markdown table."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="quickstart", help="one of llamajax.config.PRESETS")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--prompt_len", type=int, default=128, help="tokens a prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens that follow each")
    parser.add_argument("--rounds", type=int, default=5, help="generations that are timed")
    parser.add_argument("--dtype", choices=get_args(ComputeDtype), help="as in llamajax.generate")
    parser.add_argument("--transformers", action="store_true", help="time it beside ours")
    parser.add_argument("--mesh", help="AXIS=SIZE,...; default: as llamajax.generate chooses it")
    parser.add_argument("--backend", help="JAX platform; none: what JAX finds")
    parser.add_argument("--plugin", help="bare PJRT plugin library that serves --backend")
    parser.add_argument("--options", help="options of that plugin, k=v,k=v")
    parser.add_argument("--num_cpu_devices", type=int, help="virtual devices of the cpu backend")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    return parser


def checked(flags: argparse.Namespace) -> ModelConfig:
    """The model. UserError for what does not fit together."""
    config = PRESETS[preset(flags.preset)["name"]]
    for name in ("batch", "prompt_len", "rounds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: must be at least 1")
    if flags.new_tokens < 2:
        raise UserError(f"--new_tokens={flags.new_tokens}: two at least, the second is decoded")
    if flags.prompt_len + flags.new_tokens > config.max_seq_len:
        raise UserError(
            f"--prompt_len={flags.prompt_len} and --new_tokens={flags.new_tokens} are more than "
            f"the {config.max_seq_len} tokens of {config.name}"
        )
    return config


def main(argv: list[str]) -> None:
    """Measure and print."""
    flags = arguments().parse_args(argv)
    config = checked(flags)
    import jax

    from llamajax import backends, sharding
    from llamajax.decoding.generator import default_mesh
    from llamajax.models.counts import num_parameters

    machine = backends.start(
        BackendConfig(
            name=flags.backend,
            plugin=flags.plugin,
            options=flags.options,
            num_cpu_devices=flags.num_cpu_devices,
        )
    )
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
    memory = max(backends.memory_in_use().get("peak_memory_bytes", []), default=None)
    kind = "device statistics" if memory else "process peak RSS"
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
        "peak memory": f"{memory / 2**20:,.0f} MiB ({kind})",
    }
    if reference:
        speed, first = measured(reference_rounds, flags)
        rows |= {"transformers, tokens/s": speed, "transformers, time to first token": first}
    print(table(rows))


if __name__ == "__main__":
    run_verb(main)
