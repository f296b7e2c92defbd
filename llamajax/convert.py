"""`python -m llamajax.convert`: weights from one format to another, in little memory."""

import contextlib
import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from llamajax.config import Flag, parse_command_line
from llamajax.config.schema import BackendConfig, MeshConfig
from llamajax.errors import UserError, say
from llamajax.monitoring.progress import BytesProgress
from llamajax.verbs import run_verb

if TYPE_CHECKING:
    from llamajax.formats.foreign_weights import TensorSource
    from llamajax.formats.weights import Weights

SUMMARY = "Convert weights of any known kind to a Hugging Face directory."
EXAMPLE = "python -m llamajax.convert --from=runs/quickstart --to=hf/quickstart"

_FLAGS = (
    Flag(
        name="from",
        metavar="DIR",
        doc="a --workdir of train, one of its checkpoints/STEP, a Hugging Face directory, a GGUF "
        "file, or a directory of Meta's",
    ),
    Flag(name="to", metavar="DIR", doc="directory to write; appears whole or not at all"),
    Flag(
        name="format",
        metavar="NAME",
        annotation=Literal["hf"],
        default="hf",
        doc="what to write: a Hugging Face directory, which every verb takes",
    ),
    Flag(
        name="dtype",
        metavar="NAME",
        annotation=Literal["bfloat16", "float32", "float16"],
        default="bfloat16",
        doc="dtype of the written weights",
    ),
    Flag(
        name="max_shard_bytes",
        metavar="N",
        annotation=int,
        default=4_000_000_000,
        doc="largest size of one safetensors file, in bytes",
    ),
    Flag(name="overwrite", annotation=bool, default=False, doc="replace --to if it exists"),
)


def main(argv: list[str]) -> int:
    """Write the weights; return 0. A signal leaves what was there."""
    flags = parse_command_line(
        argv, verb="convert", takes_config=False, flags=_FLAGS, summary=SUMMARY, example=EXAMPLE
    )
    if flags.max_shard_bytes < 1:
        raise UserError(f"--max_shard_bytes={flags.max_shard_bytes}: must be at least 1")
    _convert(flags)
    return 0


def _convert(flags: SimpleNamespace) -> None:
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax import backends
    from llamajax.formats.huggingface.hf_write import write_hf
    from llamajax.formats.weights import open_weights
    from llamajax.tokenizers.tokenizer_identity import check_vocabulary, load_recorded

    started, target = time.monotonic(), Path(flags.to)
    backends.start(BackendConfig(name="cpu"))  # an accelerator would be taken for nothing
    weights = open_weights(getattr(flags, "from"))
    _check_apart(flags, weights)
    tokenizer = load_recorded(weights.tokenizer, weights.tokenizer_record, of=weights.path)
    check_vocabulary(tokenizer, weights.model.vocab_size)
    for line in () if tokenizer is None else tokenizer.warnings:
        say(f"warning: {line}")
    if tokenizer is None:
        say(f"warning: {weights.path} has no tokenizer: the weights are converted without one")
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


def _check_apart(flags: SimpleNamespace, weights: "Weights") -> None:
    """Raise UserError when --to holds what is read: writing it would delete that."""
    target = Path(flags.to).resolve()
    for read in (Path(getattr(flags, "from")), weights.path, weights.tokenizer):
        if read is not None and read.resolve().is_relative_to(target):
            raise UserError(f"--to={flags.to} holds what is read, {read}; name another directory")


def _tensors(weights: "Weights") -> "TensorSource":
    """The tensors that are read."""
    import jax

    from llamajax import sharding
    from llamajax.models.abstract import abstract_model

    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    return weights.tensors(abstract_model(weights.model, mesh))


def _note_rounding(source: "TensorSource", dtype: str) -> None:
    """Say so when the written matrices hold less than those that are read."""
    keeps_all_of = {"float32": ("bfloat16", "float16", "float32")}
    stored = {source.dtype(n).name for n in source.names() if len(source.shape(n)) > 1}
    if rounded := sorted(stored - set(keeps_all_of.get(dtype, (dtype,)))):
        words = " and ".join(rounded)
        say(f"note: {words} weights are rounded to {dtype}; --dtype=float32 keeps every bit")


if __name__ == "__main__":
    run_verb(main)
