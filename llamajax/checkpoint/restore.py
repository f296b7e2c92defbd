"""Reading checkpoints: open one, verify it once, restore its arrays onto any mesh.

Reading never writes, so it is safe beside a run that is saving. Everything that can be refused is
refused before the first array is read: damage, another model, another tree.
"""

import errno
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.names import named_leaves, rebuild
from llamajax.checkpoint.parts import StoredArray, placed
from llamajax.checkpoint.storage import Place, failures, how_to_mend, is_directory, is_remote
from llamajax.config.flags import show
from llamajax.errors import UserError, combine
from llamajax.processes.agreement import agree

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


class Checkpoint:
    """One checkpoint that is open for reading: manifest and meta are read once, here.

    Opening compares the sizes of all files. `verify` compares their contents, at most once, before
    anything is restored. Everything that reads a checkpoint shares one of these.
    """

    def __init__(self, directory: Place):
        """Raises DamagedError when a file is missing, or has another size."""
        self.directory = directory
        self.manifest = manifests.check_sizes(directory)
        self.meta: dict[str, Any] = manifests.read_meta(directory, self.manifest)
        self._verified = False

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def step(self) -> int:
        return self.manifest.step

    @functools.cached_property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array by name."""
        stored = self.manifest.arrays.items()
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in stored}

    def array(self, name: str) -> StoredArray:
        """Open one array, of which any part can be read."""
        return StoredArray(self.directory / manifests.STATE, name)

    def verify(self) -> None:
        """Read all files once, divided among the processes; UserError on all if one is damaged.

        To be called by all processes.
        """
        if problem := self.find_damage():
            raise damaged(self.directory, problem)

    def find_damage(self) -> str | None:
        """As `verify`, but return what is wrong with the checkpoint, or None."""
        if not self._verified:
            files = sorted(self.manifest.files.keys() - {manifests.META})
            share = files[jax.process_index() :: jax.process_count()]
            problem = _agreed_damage(
                self.directory,
                lambda: manifests.check_contents(self.directory, self.manifest, share),
            )
            if problem:
                return problem
            self._verified = True
        return None


def open_checkpoint(directory: Place) -> Checkpoint:
    """Open one checkpoint (`checkpoints/STEP`); cheap. Raises UserError if it is damaged."""
    if not is_directory(directory):
        steps = manifests.complete_steps(directory.parent)
        have = f"complete ones are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"no checkpoint {directory}; in {directory.parent} {have}")
    try:
        return Checkpoint(directory)
    except DamagedError as error:
        raise damaged(directory, str(error)) from None


def newest_checkpoint(directory: Place) -> Checkpoint | None:
    """Open the newest checkpoint under `directory`; None where there is none.

    Raises UserError when the newest is damaged: nobody shall take older weights for the newest.
    """
    found = manifests.step_directories(directory)
    return open_checkpoint(found[-1]) if found else None


def open_verified(directory: Place) -> tuple[Checkpoint | None, str | None]:
    """Open a checkpoint and verify it; if it is damaged, None and what is wrong.

    To be called by all processes, which get the same answer whoever of them saw the damage. Raises
    UserError on all where one cannot read it for another reason than damage.
    """
    opened: list[Checkpoint] = []
    problem = _agreed_damage(directory, lambda: opened.append(Checkpoint(directory)))
    problem = problem or opened[0].find_damage()
    return (None, problem) if problem else (opened[0], None)


def _agreed_damage(directory: Place, read: Callable[[], None]) -> str | None:
    """Return the damage that `read` finds on any process, the same on all; None if there is none.

    Raises UserError on all where one cannot read for another reason than damage.
    """
    problem = refusal = None
    try:
        read()
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


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _equal(one: Any, other: Any) -> bool:
    """Equal, but for what is lost where a format stores numbers in float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def model_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name every key of the architecture in which weights differ from the run that wants them."""
    old, new = _flatten(saved), _flatten(wanted)
    return [
        f"model.{key}: the weights have {show(old.get(key))}, this run {show(new.get(key))}; "
        f"use --config.model.{key}={show(old.get(key))}"
        for key in {**new, **old}
        if key not in _HARMLESS and not _equal(old.get(key), new.get(key))
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
    checkpoint: Checkpoint,
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
    saved_config = checkpoint.meta.get("config") or {}
    if model is not None and "model" in saved_config:
        problems += model_differences(saved_config["model"], model)
    problems += _array_differences(checkpoint.arrays, abstract, partial=partial, cast=cast)
    if problems:
        more = len(problems) - _LISTED
        shown = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise combine(
            shown,
            title=f"checkpoint {checkpoint} is of another model than this run's; choose another "
            "--workdir, or the config that it was saved with:",
        )


def _restored(stored: StoredArray, leaf: Any, *, donated: bool) -> Any:
    if leaf.sharding is None:
        return stored.read(tuple(slice(0, n) for n in leaf.shape), leaf.dtype)
    return placed(leaf, lambda index: stored.read(index, leaf.dtype), donated=donated)


def restore_state(
    checkpoint: Checkpoint,
    abstract_state: Any,
    *,
    model: Mapping[str, Any] | None = None,
    partial: bool = False,
    cast: bool = False,
    donated: bool = False,
) -> Any:
    """A tree like `abstract_state` filled from one checkpoint, bit for bit.

    abstract_state: leaves are `jax.ShapeDtypeStruct`; each array is read straight into the
    leaf's sharding, whatever mesh or device count saved it; without a sharding it becomes a NumPy
    array. model: the model section of the config, compared with the one in the meta.
    partial: the checkpoint may hold more arrays than are wanted (weights without optimizer).
    cast: arrays of another dtype are converted to the wanted one, part by part as they are read.
    donated: the arrays will be donated to a jitted function. Without it the CPU's are the very
    memory that was read into, which XLA would copy then. Where devices have memory of their own,
    the host holds one part of one array at a time.
    Raises UserError, before reading, when the checkpoint is damaged or of another model. To be
    called by all processes.
    """
    abstract = named_leaves(abstract_state)
    check_same_model(checkpoint, abstract, model=model, partial=partial, cast=cast)
    checkpoint.verify()
    try:
        leaves = {
            name: _restored(checkpoint.array(name), leaf, donated=donated)
            for name, leaf in abstract.items()
        }
    except DamagedError as error:
        raise damaged(checkpoint.directory, str(error)) from None
    return rebuild(abstract_state, leaves)
