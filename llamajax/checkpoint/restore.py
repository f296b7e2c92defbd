"""Reading checkpoints: which is newest, what it holds, and its arrays onto any mesh.

Reading never writes, so it is safe beside a run that is saving. Everything that can be refused is
refused before the first array is read: damage, another model, another tree.
"""

import errno
import json
from collections.abc import Mapping
from typing import Any

import jax

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.agreement import agree
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.names import named_leaves, rebuild
from llamajax.checkpoint.parts import StoredArray, placed
from llamajax.checkpoint.storage import Place, failures, how_to_mend, is_directory, is_remote
from llamajax.errors import UserError, combine

_LISTED = 10
# Keys of the model section that change neither the arrays nor the function they compute.
_HARMLESS = ("name", "init_std", "max_seq_len")


def damaged(directory: Place, problem: str, *, hopeless: bool = False) -> UserError:
    """The refusal of a damaged checkpoint: names the file, the previous complete one, the fix.

    hopeless: the earlier ones are known to be damaged as well.
    """
    step = int(directory.name)
    others = [n for n in manifests.complete_steps(directory.parent) if n < step]
    others = [] if hopeless else others
    away = f"mv {directory} {directory}.damaged"
    if is_remote(directory):
        away = f"rename {directory / manifests.MANIFEST} to {manifests.ASIDE}"
    if others:
        fix = (
            f"The previous complete checkpoint is {directory.parent / str(others[-1])}. "
            f"To use that one, move the damaged one away and run the same command again: {away}"
        )
    else:
        fix = f"There is no earlier complete checkpoint. To start over, move it away: {away}"
    return UserError(f"checkpoint {directory} is damaged: {problem}\n{fix}")


def newest_step(directory: Place) -> int | None:
    """The newest checkpoint under `directory`, or None where there is none.

    Raises UserError when the newest is damaged: nobody shall take older weights for the newest.
    """
    found = manifests.step_directories(directory)
    if not found:
        return None
    problem = manifests.find_damage(found[-1])
    if problem is not None:
        raise damaged(found[-1], problem)
    return int(found[-1].name)


def _existing(directory: Place) -> Place:
    if not is_directory(directory):
        steps = manifests.complete_steps(directory.parent)
        have = f"complete ones are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"no checkpoint {directory}; in {directory.parent} {have}")
    return directory


def read_meta(directory: Place) -> dict[str, Any]:
    """The JSON dict saved with one checkpoint (`checkpoints/STEP`); cheap. UserError if damaged."""
    try:
        manifests.check_contents(_existing(directory), only=[manifests.META])
        return json.loads((directory / manifests.META).read_bytes())
    except DamagedError as error:
        raise damaged(directory, str(error)) from None


def read_arrays_index(directory: Place) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of one checkpoint by name, without reading any."""
    try:
        arrays = manifests.check_sizes(_existing(directory)).arrays
    except DamagedError as error:
        raise damaged(directory, str(error)) from None
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in arrays.items()}


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _config_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    old, new = _flatten(saved), _flatten(wanted)
    return [
        f"config.model.{key}: the checkpoint has {old.get(key)}, this run {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in _HARMLESS and old.get(key) != new.get(key)
    ]


def _array_differences(
    stored: Mapping[str, jax.ShapeDtypeStruct],
    wanted: Mapping[str, Any],
    *,
    partial: bool,
    cast: bool,
) -> list[str]:
    problems = []
    for name, leaf in wanted.items():
        if name not in stored:
            problems.append(f"{name}: not in the checkpoint")
        elif stored[name].shape != leaf.shape or (stored[name].dtype != leaf.dtype and not cast):
            problems.append(
                f"{name}: the checkpoint has {stored[name].dtype}{list(stored[name].shape)}, "
                f"this run {leaf.dtype}{list(leaf.shape)}"
            )
    if not partial:
        problems += [f"{n}: only in the checkpoint" for n in stored if n not in wanted]
    return problems


def check_same_model(
    directory: Place,
    abstract: Mapping[str, Any],
    *,
    model: Mapping[str, Any] | None,
    partial: bool,
    cast: bool = False,
) -> None:
    """Raise one UserError that lists how a checkpoint differs from the wanted state, if it does.

    abstract: leaves by name with `.shape` and `.dtype`. model: the model section of the config.
    """
    problems = []
    saved_config = read_meta(directory).get("config") or {}
    if model is not None and "model" in saved_config:
        problems += _config_differences(saved_config["model"], model)
    stored = read_arrays_index(directory)
    problems += _array_differences(stored, abstract, partial=partial, cast=cast)
    if problems:
        more = len(problems) - _LISTED
        shown = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise combine(
            shown,
            title=f"checkpoint {directory} is of another model than this run's; choose another "
            "--workdir, or the config that it was saved with:",
        )


def damage_anywhere(directory: Place) -> str | None:
    """What is wrong with one checkpoint as any process sees it, the same on all; None if nothing.

    Raises UserError on all where one cannot read it for another reason than damage.
    """
    problem = refusal = None
    try:
        share = (jax.process_index(), jax.process_count())
        manifests.check_contents(directory, share=share)
    except DamagedError as error:
        problem = str(error)
    except failures(directory) as error:
        if is_remote(directory):
            refusal = f"cannot read checkpoint {directory}: {error}; {how_to_mend(directory)}"
        elif error.errno == errno.EIO:  # the disk itself gives up on these bytes
            problem = f"{error.filename or directory} cannot be read: {error.strerror}"
        else:
            refusal = f"cannot read checkpoint {directory}: {error.strerror}: {error.filename}"
    if refusal := agree(refusal):
        raise UserError(refusal)
    return agree(problem)


def _restored(state: Place, name: str, leaf: Any, *, donated: bool) -> Any:
    stored = StoredArray(state, name)
    if leaf.sharding is None:
        return stored.read(tuple(slice(0, n) for n in leaf.shape), leaf.dtype)
    return placed(leaf, lambda index: stored.read(index, leaf.dtype), donated=donated)


def restore_state(
    directory: Place,
    abstract_state: Any,
    *,
    model: Mapping[str, Any] | None = None,
    partial: bool = False,
    cast: bool = False,
    donated: bool = False,
    verified: bool = False,
) -> Any:
    """A tree like `abstract_state` filled from one checkpoint (`checkpoints/STEP`), bit for bit.

    abstract_state: leaves are `jax.ShapeDtypeStruct`; each array is read straight into the
    leaf's sharding, whatever mesh or device count saved it; without a sharding it becomes a NumPy
    array. model: the model section of the config, compared with the one in `meta["config"]`.
    partial: the checkpoint may hold more arrays than are wanted (weights without optimizer).
    cast: arrays of another dtype are converted to the wanted one, part by part as they are read.
    donated: the arrays will be donated to a jitted function. Without it the CPU's are the very
    memory that was read into, which XLA would copy then. Where devices have memory of their own,
    the host holds one part of one array at a time. verified: its files were just read in full.
    Raises UserError, before reading, when the checkpoint is damaged or of another model. To be
    called by all processes.
    """
    abstract = named_leaves(abstract_state)
    check_same_model(directory, abstract, model=model, partial=partial, cast=cast)
    if not verified and (problem := damage_anywhere(directory)):
        raise damaged(directory, problem)
    state = directory / manifests.STATE
    try:
        leaves = {
            name: _restored(state, name, leaf, donated=donated) for name, leaf in abstract.items()
        }
    except DamagedError as error:
        raise damaged(directory, str(error)) from None
    return rebuild(abstract_state, leaves)
