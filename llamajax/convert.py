"""Convert weights of any known kind to a Hugging Face directory, in little memory.

Example:
  python -m llamajax.convert --from=runs/quickstart --to=hf/quickstart
"""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llamajax.config import BackendConfig, Flags, MeshConfig, key, parse_command_line
from llamajax.errors import UserError, say
from llamajax.monitoring.progress import BytesProgress
from llamajax.verbs import run_verb

if TYPE_CHECKING:
    from llamajax.formats.foreign_weights import TensorSource
    from llamajax.formats.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFlags(Flags):
    """Flags of `convert`."""

    from_: str = key(
        "a --workdir of train, one of its checkpoints/STEP, a Hugging Face directory, a GGUF file, "
        "or a directory of Meta's",
        metavar="DIR",
        is_path=True,
    )
    to: str = key("directory to write; appears whole or not at all", metavar="DIR", is_path=True)
    format: Literal["hf"] = key(
        "what to write: a Hugging Face directory, which every verb takes",
        metavar="NAME",
        default="hf",
    )
    dtype: Literal["bfloat16", "float32", "float16"] = key(
        "dtype of the written weights", metavar="NAME", default="bfloat16"
    )
    max_shard_bytes: int = key(
        "largest size of one safetensors file, in bytes",
        metavar="N",
        default=4_000_000_000,
        at_least=1,
    )
    overwrite: bool = key("replace --to if it exists", default=False)


def main(argv: list[str]) -> int:
    """Write the weights; return 0. A signal leaves what was there."""
    flags = parse_command_line(argv, ConvertFlags, verb="convert", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax import backends
    from llamajax.formats.huggingface.hf_write import write_hf
    from llamajax.formats.weights import open_weights
    from llamajax.tokenizers.tokenizer_identity import check_vocabulary

    started, target = time.monotonic(), Path(flags.to)
    backends.start(BackendConfig(name="cpu"))  # an accelerator would be taken for nothing
    weights = open_weights(flags.from_)
    _check_apart(flags, weights)
    tokenizer = weights.load_tokenizer()
    check_vocabulary(tokenizer, weights.model.vocab_size)
    missing = f"{weights.path} has no tokenizer: the weights are converted without one"
    for line in [missing] if tokenizer is None else tokenizer.warnings:
        say(f"warning: {line}")
    source = _tensors(weights)
    _note_rounding(source, flags.dtype)
    progress = BytesProgress()
    with contextlib.closing(progress):
        warnings = write_hf(
            source,
            weights.model,
            target,
            dtype=flags.dtype,
            tokenizer=tokenizer,
            max_shard_bytes=flags.max_shard_bytes,
            overwrite=flags.overwrite,
            progress=functools.partial(progress, "weights"),
        )
    for line in warnings:
        say(f"warning: {line}")
    print(
        f"{weights.kind} -> hf: {progress.total:,} bytes of {flags.dtype} weights in {target}, "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    return 0


def _check_apart(flags: ConvertFlags, weights: "Weights") -> None:
    """Raise UserError when --to holds what is read: writing it would delete that."""
    target = Path(flags.to).resolve()
    for read in (Path(flags.from_), weights.path, weights.tokenizer):
        if read is not None and read.resolve().is_relative_to(target):
            raise UserError(f"--to={flags.to} holds what is read, {read}; name another directory")


def _tensors(weights: "Weights") -> "TensorSource":
    """Open the tensors that are read."""
    import jax

    from llamajax import sharding
    from llamajax.models.abstract import abstract_model

    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    return weights.tensors(abstract_model(weights.model, mesh))


def _note_rounding(source: "TensorSource", dtype: str) -> None:
    """Print a note when the written matrices hold less than those that are read."""
    keeps_all_of = {"float32": ("bfloat16", "float16", "float32")}
    stored = {source.dtype(n).name for n in source.names() if len(source.shape(n)) > 1}
    if rounded := sorted(stored - set(keeps_all_of.get(dtype, (dtype,)))):
        words = " and ".join(rounded)
        say(f"note: {words} weights are rounded to {dtype}; --dtype=float32 keeps every bit")


if __name__ == "__main__":
    run_verb(main)
