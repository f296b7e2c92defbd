"""Open weights of any known kind, and load their arrays onto any mesh.

A kind is recognized by the files at a path, never by a name: our checkpoints first, then each
foreign format in the order of RECOGNIZERS. A new foreign format is one more function in that table.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.backends.object_stores import how_to_fix
from llamajax.checkpoint import location
from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.directory_owner import recorded_directory
from llamajax.checkpoint.leaf_names import named_leaves
from llamajax.checkpoint.location import Location
from llamajax.checkpoint.restore import (
    Checkpoint,
    newest_checkpoint,
    open_checkpoint,
    restore_state,
)
from llamajax.config import build_model
from llamajax.config.saved_config import from_json_dict, record_of_step
from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.errors import UserError, combine, listed
from llamajax.formats.foreign_weights import ForeignWeights, TensorSource
from llamajax.formats.gguf import gguf_config
from llamajax.formats.huggingface import hf_read
from llamajax.formats.huggingface.hf_names import tensors
from llamajax.formats.llama_sources import (
    AVERAGE,
    CheckpointSource,
    MergedSource,
    pairs_of,
    read_factors,
)
from llamajax.formats.meta import meta_config
from llamajax.formats.peft import PeftAdapters, find_base, is_peft, open_adapters, read_peft_config
from llamajax.tokenizers import Tokenizer
from llamajax.tokenizers.loading import find_tokenizer
from llamajax.tokenizers.special_tokens import model_ids
from llamajax.tokenizers.tokenizer_identity import load_recorded

# Kind -> what opens a path: returns None if it is of another kind, UserError if it is broken.
RECOGNIZERS: dict[str, Callable[[Path], ForeignWeights | None]] = {
    "huggingface": hf_read.recognize,
    "gguf": gguf_config.recognize,
    "meta": meta_config.recognize,
}
# Directory of a run's tokenizer, in its --workdir.
TOKENIZER = "tokenizer"
# Training changes nearly every value of every tensor, so a few rows of each tell two bases apart.
_FINGERPRINT_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Opened weights, checked as far as headers allow; nothing is read yet.

    kind: llamajax, peft, or one of RECOGNIZERS. path: what was opened; for llamajax the checkpoint
    of one step. tokenizer: what `load_tokenizer` takes, None where there is none. tokenizer_record:
    what a checkpoint says of the tokenizer that it was trained with, if it does. checkpoint: of
    llamajax; source: the tensors of another kind. base: what adapters are added to; they are read
    as the merged model. lora: the config of our adapters; adapters: those of PEFT.
    """

    kind: str
    path: Location
    model: ModelConfig
    tokenizer: Path | None
    checkpoint: Checkpoint | None = None
    source: TensorSource | None = None
    tokenizer_record: Mapping[str, Any] | None = None
    base: "Weights | None" = None
    lora: LoraConfig | None = None
    adapters: PeftAdapters | None = None

    @property
    def step(self) -> int | None:
        """Step of a llamajax checkpoint."""
        return None if self.checkpoint is None else self.checkpoint.step

    def load_tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer. UserError if the checkpoint was trained with another one."""
        found = load_recorded(self.tokenizer, self.tokenizer_record, of=self.path)
        if found is not None and self.adapters is not None and not found.facts.model.eos_ids:
            # PEFT keeps a copy of the tokenizer, but not of what ends a text.
            found.facts = dataclasses.replace(found.facts, model=model_ids(self.base.path))
        return found

    def fingerprint(self) -> str:
        """Return an identity of these weights: equal for a copy, another after any training.

        Of foreign weights it covers the shape, dtype and first rows of each tensor.
        """
        if self.checkpoint is not None:
            return self.checkpoint.manifest.fingerprint
        if self.adapters is not None:
            both = self.base.fingerprint() + self.adapters.fingerprint
            return hashlib.sha256(both.encode()).hexdigest()
        digest, available = hashlib.sha256(), set(self.source.names())
        for tensor in tensors(self.model):
            if tensor.name in available:
                dtype = self.source.dtype(tensor.name).name
                index = tuple(slice(0, n) for n in tensor.shape)
                index = (slice(0, min(tensor.shape[0], _FINGERPRINT_ROWS)), *index[1:])
                digest.update(f"{tensor.name} {tensor.shape} {dtype}\n".encode())
                part = self.source.read(tensor.name, index)
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def tensors(self, abstract_model: Any, *, average: bool = False) -> TensorSource:
        """Return all weights as Hugging Face tensors, adapters merged.

        abstract_model: tells which dims a weight of ours has. average: those of `optim.ema_decay`;
        UserError where there are none. To be called by all processes, because adapters are read.
        """
        part = AVERAGE if average else None
        arrays = () if self.checkpoint is None else self.checkpoint.arrays
        if average and not any(name.startswith(AVERAGE) for name in arrays):
            raise UserError(
                f"{self.path} ({self.kind}) holds no average of the weights: a run keeps one with "
                "optim.ema_decay"
            )
        if self.source is not None:
            return self.source
        if self.base is None:
            return CheckpointSource(self.checkpoint, self.model, abstract_model, part)
        base = self.base.tensors(abstract_model)
        if self.adapters is not None:
            pairs, replaced = self.adapters.pairs, self.adapters.replaced
            return MergedSource(base, self.model, pairs, replaced=replaced)
        pairs = pairs_of(read_factors(self.checkpoint, part), self.lora)
        return MergedSource(base, self.model, pairs, base_dtype=self.lora.base_dtype)

    def load(self, abstract_model: Any) -> Any:
        """Read a model like `abstract_model`, each leaf straight into its shards.

        abstract_model: `jax.ShapeDtypeStruct`s with shardings, of this architecture, in the wanted
        dtypes (`models.abstract.abstract_model`). Raises UserError for damage and mismatches. To be
        called by all processes.
        """
        if self.source is not None or self.base is not None:
            source = self.tensors(abstract_model)
            return hf_read.load_tensors(source, self.model, abstract_model)
        wanted = {"model": abstract_model}
        model = restore_state(self.checkpoint, wanted, partial=True, cast=True)["model"]
        _check_finite(model, self.path)
        return model


@jax.jit
def _all_finite(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(weight).all() for name, weight in weights.items()}


def _check_finite(model: Any, path: Location) -> None:
    """Raise UserError that names every weight with a NaN or an infinity: one reduction each.

    On the devices, so that all processes have the answer. Other formats are checked as read.
    """
    finite = jax.device_get(_all_finite(named_leaves(model)))
    if bad := [name for name, is_finite in finite.items() if not is_finite]:
        raise UserError(
            f"{path}: these weights hold values that are NaN or infinite: {listed(bad, most=10)}; "
            "take an earlier checkpoint"
        )


def open_weights(path: str | PurePath) -> Weights:
    """Open the weights at `path`.

    A --workdir of train (its newest checkpoint), one checkpoints/STEP, a directory of checkpoints
    (of these two also the URL), a Hugging Face directory, or another kind of RECOGNIZERS. Raises
    UserError when it is none of these, or when it is one that is damaged or not supported.
    """
    path = location.locate(path)
    if location.is_remote(path):
        return _open_url(path)
    if not path.exists():
        raise UserError(
            f"{path}: there is no such file or directory; a model of the Hugging Face hub is "
            "downloaded first: hf download ORGANIZATION/NAME --local-dir DIRECTORY"
        )
    checkpoint = _checkpoint_in(path)
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, run=path)
    if is_peft(path):
        return _of_peft(path)
    for kind, recognize in RECOGNIZERS.items():
        found = recognize(path)
        if found is not None:
            hf_read.check_tensors(found.source, found.model, path=path)
            return Weights(kind=kind, path=path, **vars(found))
    if revisions := sorted(path.glob("snapshots/*")):
        raise UserError(f"{path} is the root of a hub cache; name a revision in it: {revisions[0]}")
    raise UserError(
        f"{path} holds no weights that llamajax knows: give a --workdir of train with a finished "
        "checkpoint, one of its checkpoints/STEP, a Hugging Face directory (config.json and "
        "safetensors), a directory of PEFT's adapters, a GGUF file, or Meta's params.json with "
        "consolidated.*.pth"
    )


def _of_peft(path: Path, above: tuple[Path, ...] = ()) -> Weights:
    """Return a base with the adapters of a PEFT directory; its tokenizer, else the base's.

    above: directories of adapters that name this one as their base.
    """
    config = read_peft_config(path)
    above, found = (*above, path.resolve()), find_base(path, config)
    if found.resolve() in above:
        raise UserError(
            f'{path}: "base_model_name_or_path" of its adapter_config.json leads to {found}, '
            "which holds these adapters; write the directory of the base there"
        )
    base = _of_peft(found, above) if is_peft(found) else open_weights(found)
    return Weights(
        kind="peft",
        path=path,
        model=base.model,
        tokenizer=find_tokenizer(path) or base.tokenizer,
        tokenizer_record=base.tokenizer_record if find_tokenizer(path) is None else None,
        base=base,
        adapters=open_adapters(path, config, base.model),
    )


def last_checkpoints(weights: Weights, count: int) -> list[Weights]:
    """Open the last `count` complete checkpoints of a run, up to that of `weights`, oldest first.

    Raises UserError where there are fewer, and for weights of another kind.
    """
    if weights.checkpoint is None:
        raise UserError(
            f"{weights.path} ({weights.kind}) has no earlier checkpoints; name a --workdir of train"
        )
    directory = weights.path.parent
    with location.store_errors_explained(directory):
        steps = [s for s in manifests.complete_steps(directory) if s <= weights.checkpoint.step]
    if len(steps) < count:
        raise UserError(
            f"{directory} holds {len(steps)} complete checkpoints up to step "
            f"{weights.checkpoint.step}, not {count}; checkpoint.keep says how many a run keeps"
        )
    return [open_weights(directory / str(step)) for step in steps[-count:]]


def _open_url(path: Location) -> Weights:
    with location.store_errors_explained(path):
        if (checkpoint := _checkpoint_in(path)) is not None:
            return _of_checkpoint(checkpoint)
    raise UserError(
        f"{path}: there is no checkpoint of llamajax (weights in other formats are read from local "
        f"paths); {how_to_fix(str(path))}"
    )


def _checkpoint_in(path: Location) -> Checkpoint | None:
    """Open one of our checkpoints: `path` itself, or the newest under it."""
    if path.name.isdecimal() and (path / manifests.STATE).is_dir():
        return open_checkpoint(path)
    directories = [path / "checkpoints", path]
    if not location.is_remote(path) and recorded_directory(path) not in directories:
        directories.insert(0, recorded_directory(path))
    for directory in directories:
        if (checkpoint := newest_checkpoint(directory)) is not None:
            return checkpoint
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} holds a run without a finished checkpoint yet")
    return None


def open_base(record: Mapping[str, str], *, path: Location | None, adapters: PurePath) -> Weights:
    """Open the weights that adapters were trained on.

    record: their path and fingerprint, from the checkpoint of the adapters. path: where they are
    now, None: where they were. Raises UserError when they are gone or have changed.
    """
    where = location.locate(record["path"]) if path is None else path
    if not location.is_remote(where) and not where.exists():
        raise UserError(
            f"{adapters} holds adapters only, and the weights that they were trained on are gone: "
            f"there is no {where}; put them back, or link that path to where they are"
        )
    base = open_weights(where)
    found = base.fingerprint()
    if found != record["fingerprint"]:
        raise UserError(
            f"{adapters} holds adapters only, and {base.path} has other weights than those that "
            f"they were trained on ({record['path']}, fingerprint {record['fingerprint'][:12]}, "
            f"now {found[:12]}); put those back"
        )
    return base


def _of_checkpoint(checkpoint: Checkpoint, *, run: Path | None = None) -> Weights:
    """Return the weights of a checkpoint. run: its --workdir, where that was named."""
    directory, meta = checkpoint.directory, checkpoint.meta
    config, base, lora = record_of_step(meta.get("config") or {}, checkpoint.step), None, None
    if "model" not in config:
        raise UserError(f"checkpoint {directory} does not say which model it is of")
    model, problems = build_model(config["model"])
    if model is None:
        raise combine(problems, title=f"checkpoint {directory} is not of this version:")
    if "base" in meta:
        base = open_base(meta["base"], path=None, adapters=directory)
        lora = from_json_dict(config, source=str(directory / manifests.META)).lora
    return Weights(
        kind="llamajax",
        path=directory,
        model=model,
        tokenizer=_tokenizer_of(directory, config, run),
        tokenizer_record=meta.get("tokenizer"),
        checkpoint=checkpoint,
        base=base,
        lora=lora,
    )


def _tokenizer_of(directory: Location, config: dict[str, Any], run: Path | None) -> Path | None:
    """Find the tokenizer beside the checkpoints, else that of the first data set of the run."""
    beside = [] if location.is_remote(directory) else [directory.parent.parent]
    beside += [] if run is None else [run]
    for folder in (each for path in beside for each in (path, path / TOKENIZER)):
        if file := find_tokenizer(folder):
            return file
    data = (config.get("data") or {}).get("path", "").split(",")[0].strip()
    return Path(data).absolute() if data and Path(data).is_dir() else None
