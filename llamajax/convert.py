"""Convert weights of any known kind to a Hugging Face directory or a GGUF file, in little memory.

Example:
  python -m llamajax.convert --from=runs/quickstart --to=hf/quickstart
  python -m llamajax.convert --from=runs/quickstart --format=gguf --to=quickstart.gguf --dtype=q8_0
"""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Sequence
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
    to: str = key(
        "directory or GGUF file to write; appears whole or not at all", metavar="PATH", is_path=True
    )
    format: Literal["hf", "gguf"] = key(
        "what to write: a Hugging Face directory, or a GGUF file for llama.cpp",
        metavar="NAME",
        default="hf",
    )
    dtype: Literal["bfloat16", "float32", "float16", "q8_0"] = key(
        "dtype of the written weights; q8_0: 8 bits, in GGUF only",
        metavar="NAME",
        default="bfloat16",
    )
    max_shard_bytes: int = key(
        "largest size of one safetensors file, in bytes",
        metavar="N",
        default=4_000_000_000,
        at_least=1,
    )
    average: str | None = key(
        "last:N: write the mean of a run's last N checkpoints, up to the one that --from names; "
        "ema: the average that optim.ema_decay kept",
        metavar="last:N|ema",
        default=None,
    )
    overwrite: bool = key("replace --to if it exists", default=False)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.format == "hf" and self.dtype == "q8_0":
            yield "--dtype=q8_0 is of GGUF files: add --format=gguf, or choose another dtype"
        if self.format == "gguf" and self.max_shard_bytes != type(self).max_shard_bytes:
            yield "--max_shard_bytes is of --format=hf: a GGUF file is never split; leave it out"
        if self.average is not None and not re.fullmatch(r"last:[1-9]\d*|ema", self.average):
            yield (
                f"--average={self.average}: must be last:N, N being the number of checkpoints, or "
                "ema"
            )


def main(argv: list[str]) -> int:
    """Write the weights; return 0. A signal leaves what was there."""
    flags = parse_command_line(argv, ConvertFlags, verb="convert", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax import backends
    from llamajax.formats.foreign_weights import Export
    from llamajax.formats.gguf.gguf_write import write_gguf
    from llamajax.formats.huggingface.hf_write import write_hf
    from llamajax.formats.weights import last_checkpoints, open_weights
    from llamajax.tokenizers.tokenizer_identity import check_vocabulary

    started, target = time.monotonic(), Path(flags.to)
    backends.start(BackendConfig(name="cpu"))  # an accelerator would be taken for nothing
    weights = open_weights(flags.from_)
    averaged = [weights]
    if flags.average not in (None, "ema"):
        averaged = last_checkpoints(weights, int(flags.average.removeprefix("last:")))
        say(f"average  of steps {', '.join(str(each.step) for each in averaged)}")
    _check_apart(flags, averaged)
    tokenizer = weights.load_tokenizer()
    check_vocabulary(tokenizer, weights.model.vocab_size)
    missing = f"{weights.path} has no tokenizer: the weights are converted without one"
    for line in [missing] if tokenizer is None else tokenizer.warnings:
        say(f"warning: {line}")
    source = _tensors(averaged, ema=flags.average == "ema")
    _note_rounding(source, flags.dtype)
    progress = BytesProgress()
    options = {"dtype": flags.dtype, "progress": functools.partial(progress, "weights")}
    card = functools.partial(_card, flags, weights)
    export = Export(source=source, model=weights.model, tokenizer=tokenizer, card=card)
    with contextlib.closing(progress):
        if flags.format == "gguf":
            warnings = write_gguf(export, target, **options)
        else:
            options |= {"max_shard_bytes": flags.max_shard_bytes, "overwrite": flags.overwrite}
            warnings = write_hf(export, target, **options)
    for line in warnings:
        say(f"warning: {line}")
    print(
        f"{weights.kind} -> {flags.format}: {progress.total:,} bytes of {flags.dtype} weights in "
        f"{target}, {time.monotonic() - started:.1f} s",
        flush=True,
    )
    return 0


def _check_apart(flags: ConvertFlags, opened: "Sequence[Weights]") -> None:
    """Raise UserError when --to holds what is read, or is no place for a file that is asked for."""
    target = Path(flags.to).resolve()
    paths = [Path(flags.from_)]
    for each in opened:
        while each is not None:  # adapters, then their base
            paths += [path for path in (each.path, each.tokenizer) if path is not None]
            each = each.base
    for read in (path for path in paths if isinstance(path, Path)):  # others are URLs
        if read.resolve().is_relative_to(target):
            raise UserError(f"--to={flags.to} holds what is read, {read}; name another place")
        if flags.format == "gguf" and target.exists() and target.is_relative_to(read.resolve()):
            raise UserError(f"--to={flags.to} is a file of {read}, which is read; name another")
    if flags.format == "gguf" and target.is_dir():
        raise UserError(f"--to={flags.to} is a directory; name a file, as in model.gguf")
    if flags.format == "gguf" and target.exists() and not flags.overwrite:
        raise UserError(f"--to={flags.to} exists already; name another file, or pass --overwrite")


def _card(flags: ConvertFlags, weights: "Weights") -> bytes:
    """Return the card of a Hugging Face directory that is read, else one of what is known."""
    from llamajax.formats.huggingface.model_card import CARD, RunOrigin, model_card

    if weights.kind == "huggingface" and (weights.path / CARD).is_file():
        return (weights.path / CARD).read_bytes()
    run, checkpoint = None, weights.checkpoint
    if checkpoint is not None:
        workdir = Path(flags.from_)
        if isinstance(checkpoint.directory, Path) and not (workdir / "config.json").is_file():
            workdir = checkpoint.directory.parent.parent
        run = RunOrigin(step=checkpoint.step, recorded=checkpoint.meta, workdir=workdir)
    return model_card(weights.model, Path(flags.to).name, run=run, average=flags.average)


def _tensors(opened: "Sequence[Weights]", *, ema: bool) -> "TensorSource":
    """Open the tensors that are read, of several checkpoints their mean; ema: a run's average."""
    import jax

    from llamajax import sharding
    from llamajax.formats.llama_sources import AveragedSource
    from llamajax.models.abstract import abstract_model

    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    sources = [w.tensors(abstract_model(w.model, mesh), average=ema) for w in opened]
    return sources[0] if len(sources) == 1 else AveragedSource(opened[0].model, sources)


def _note_rounding(source: "TensorSource", dtype: str) -> None:
    """Print a note when the written matrices hold less than those that are read."""
    keeps_all_of = {"float32": ("bfloat16", "float16", "float32")}
    stored = {source.dtype(n).name for n in source.names() if len(source.shape(n)) > 1}
    if rounded := sorted(stored - set(keeps_all_of.get(dtype, (dtype,)))):
        words = " and ".join(rounded)
        say(f"note: {words} weights are rounded to {dtype}; --dtype=float32 keeps every bit")


if __name__ == "__main__":
    run_verb(main)
