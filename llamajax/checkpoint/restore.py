"""Open checkpoints, verify them once, and restore their arrays onto any mesh.

Reading never writes, so it is safe beside a run that is saving. Damage, another model and another
tree are refused before the first array is read. Only the run itself falls back to an older
checkpoint when the newest is damaged (`newest_intact`), because it does the lost steps again. All
other readers are refused, since they would take older weights for the newest.
"""

import dataclasses
import errno
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from llamajax.checkpoint import location
from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.leaf_names import named_leaves, rebuild
from llamajax.checkpoint.location import Location
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.stored_array import StoredArray, array_from_parts
from llamajax.config.model_schema import RopeScaling
from llamajax.config.saved_config import record_of_step
from llamajax.config.values import show
from llamajax.errors import UserError, combine
from llamajax.processes.host_collectives import broadcast_from_first, first_problem, raise_together

# Keys of the model section that change neither the arrays nor the function they compute.
_HARMLESS = ("name", "init_std", "max_seq_len")
_ALARM = "!" * 12

Damaged = list[tuple[Location, str]]  # checkpoints, and what is wrong with each


class Checkpoint:
    """One checkpoint open for reading; its manifest and meta are read once, here.

    Opening compares the sizes of all files. `verify` compares their contents, at most once, before
    anything is restored.
    """

    def __init__(self, directory: Location):
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
        """Shape and dtype of each array in the checkpoint, by name."""
        stored = self.manifest.arrays.items()
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in stored}

    def array(self, name: str) -> StoredArray:
        """Open one array, of which any part can be read."""
        return StoredArray(self.directory / manifests.STATE, name)

    def verify(self) -> None:
        """Raise UserError on all processes if a file is damaged. To be called by all."""
        if problem := self.find_damage():
            raise _damaged(self.directory, problem)

    def find_damage(self) -> str | None:
        """Read all files once, divided among the processes; return what is damaged, or None.

        To be called by all processes, which get the same answer.
        """
        if self._verified:
            return None
        error = None
        files = sorted(self.manifest.files.keys() - {manifests.META})
        share = files[jax.process_index() :: jax.process_count()]
        try:
            manifests.check_contents(self.directory, self.manifest, share)
        except (DamagedError, OSError) as caught:
            error = caught
        problem = _damage_on_any(self.directory, error)
        self._verified = problem is None
        return problem


def open_checkpoint(directory: Location) -> Checkpoint:
    """Open one checkpoint (`checkpoints/STEP`); cheap. Raises UserError if it is damaged."""
    if not directory.is_dir():
        steps = manifests.complete_steps(directory.parent)
        have = f"complete ones are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"no checkpoint {directory}; in {directory.parent} {have}")
    try:
        return Checkpoint(directory)
    except DamagedError as error:
        raise _damaged(directory, str(error)) from None


def newest_checkpoint(directory: Location) -> Checkpoint | None:
    """Open the newest checkpoint under `directory`; None where there is none.

    Raises UserError when the newest is damaged.
    """
    found = manifests.step_directories(directory)
    return open_checkpoint(found[-1]) if found else None


def newest_intact(directory: Location) -> tuple[Checkpoint | None, list[str], Damaged]:
    """Return the newest checkpoint with no damaged file, verified, and warnings to print.

    None where there is no checkpoint at all. Also returns the newer, damaged ones, which are to be
    set aside so that their steps can be saved again. Raises UserError when all are damaged. To be
    called by all processes, which get the same answer whichever of them saw the damage.
    """
    damaged: Damaged = []
    steps = [int(path.name) for path in manifests.step_directories(directory)]
    while (step := broadcast_from_first(functools.partial(max, steps, default=None))) is not None:
        path = directory / str(step)
        checkpoint, problem = _open_verified(path)
        if checkpoint is not None:
            warnings = _fallback_warnings(damaged, step) if damaged else []
            return checkpoint, warnings, damaged
        damaged.append((path, problem))
        steps = [number for number in steps if number < step]
    if damaged:
        raise _damaged(*damaged[0], hopeless=True)
    return None, [], []


def _open_verified(directory: Location) -> tuple[Checkpoint | None, str | None]:
    """Open a checkpoint and read all its files; if it is damaged, None and what is wrong.

    To be called by all processes. Raises UserError on all where one cannot read it for another
    reason than damage.
    """
    checkpoint = error = None
    try:
        checkpoint = Checkpoint(directory)
    except (DamagedError, OSError) as caught:
        error = caught
    problem = _damage_on_any(directory, error) or checkpoint.find_damage()
    return (None, problem) if problem else (checkpoint, None)


def _damage_on_any(directory: Location, error: Exception | None) -> str | None:
    """Return the damage that any process found, the same on all; None if there is none.

    error: what this process met. Raises UserError on all where it is something else than damage.
    """
    problem = refusal = None
    if isinstance(error, DamagedError):
        problem = str(error)
    elif error is not None and error.errno == errno.EIO:  # the disk itself gives up on these bytes
        problem = f"{error.filename or directory} cannot be read: {error.strerror}"
    elif error is not None:
        refusal = location.refusal(error, directory, f"cannot read checkpoint {directory}")
    raise_together(refusal)
    return first_problem(problem)


def set_aside_damaged(damaged: Damaged) -> None:
    """Set damaged checkpoints aside, on process 0. UserError on all if the disk refuses.

    They become `STEP.damaged`; in an object store they are marked, and kept until their step is
    saved again.
    """
    problem = None
    for path, what in damaged if jax.process_index() == 0 else ():
        try:
            manifests.set_aside(path, "damaged")
        except OSError as error:
            what = f"{path} is damaged ({what}) and cannot be renamed"
            problem = location.refusal(error, path, what)
    raise_together(problem)


def _fallback_warnings(damaged: Damaged, step: int) -> list[str]:
    """Describe damaged checkpoints, newest first, and the step to continue from."""
    warnings = []
    for path, what in damaged:
        kept = (
            f"marked by {manifests.ASIDE}, and kept until its step is saved again"
            if location.is_remote(path)
            else f"kept aside as {manifests.aside_name(path, 'damaged').name}"
        )
        warnings.append(f"{_ALARM} checkpoint {path} is damaged: {what}; {kept}")
    newest = damaged[0][0]
    last = int(newest.name)
    again = f"step {last} is" if last == step + 1 else f"steps {step + 1} to {last} are"
    where = f"{newest.with_name(str(step))}, the newest that is whole"
    return [*warnings, f"{_ALARM} falling back to {where}: {again} done again"]


def _damaged(directory: Location, problem: str, *, hopeless: bool = False) -> UserError:
    """Return the refusal of a damaged checkpoint: the file, the previous complete one, the fix.

    hopeless: the earlier ones are known to be damaged as well.
    """
    step = int(directory.name)
    others = [n for n in manifests.complete_steps(directory.parent) if n < step]
    away = f"mv {directory} {directory}.damaged"
    if location.is_remote(directory):
        away = f"rename {directory / manifests.MANIFEST} to {manifests.ASIDE}"
    if others and not hopeless:
        fix = (
            f"The previous complete checkpoint is {directory.parent / str(others[-1])}. "
            f"To use that one, move the damaged one away and run the same command again: {away}"
        )
    else:
        fix = f"There is no earlier complete checkpoint. To start over, move it away: {away}"
    return UserError(f"checkpoint {directory} is damaged: {problem}\n{fix}")


def model_differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], *, step: int = 0
) -> list[str]:
    """Name every key of the model section in which the weights differ from the run's config.

    step: of the run whose checkpoint holds the weights; 0 where it is another run's.
    """
    old, new = (dict(section) for section in (saved, wanted))
    scalings = [
        section and RopeScaling(**section)  # older checkpoints lack the keys added since
        for section in (old.pop("rope_scaling", None), new.pop("rope_scaling", None))
    ]
    return [
        f"model.{key}: the weights have {show(old.get(key))}, this run {show(new.get(key))}; "
        f"use --config.model.{key}={show(old.get(key))}"
        for key in {**new, **old}
        if key not in _HARMLESS and not _equal(old.get(key), new.get(key))
    ] + list(_rope_difference(*scalings, step=step))


def _rope_difference(
    old: RopeScaling | None, new: RopeScaling | None, *, step: int
) -> Iterator[str]:
    """Yield how the rotary scalings differ, with all flags that give the run that of the weights.

    old: of the weights. new: of the run. step: as in `model_differences`.
    """
    before, after = ({} if each is None else dataclasses.asdict(each) for each in (old, new))
    if all(_equal(before.get(name), after.get(name)) for name in {**before, **after}):
        return
    key = "--config.model.rope_scaling"
    kept = before if new else old.given() if old else {}
    flags = [
        f"{key}.{name}={show(value)}"
        for name, value in kept.items()
        if not _equal(value, after.get(name))
    ]
    fix = " ".join(flags) or f"{key}=none"
    if step and new:
        stage = json.dumps({"from_step": step, "rope_scaling": new.given()})
        fix += f"; to change it from step {step} on, also add {stage} to data.stages"
    yield f"model.rope_scaling: the weights have {show(old)}, this run {show(new)}; use {fix}"


def _equal(one: Any, other: Any) -> bool:
    """Compare two values; floats up to what a format loses that stores them in float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


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
    partial, cast: as in `restore_state`.
    """
    keys, arrays = [], {}
    saved_config = record_of_step(checkpoint.meta.get("config") or {}, checkpoint.step)
    stored = checkpoint.arrays
    if model is not None and "model" in saved_config:
        keys = model_differences(saved_config["model"], model, step=checkpoint.step)
    for name, leaf in abstract.items():
        if name not in stored:
            arrays[name] = "not in the checkpoint"
        elif stored[name].shape != leaf.shape or (stored[name].dtype != leaf.dtype and not cast):
            arrays[name] = (
                f"the checkpoint has {stored[name].dtype}{list(stored[name].shape)}, "
                f"this run {leaf.dtype}{list(leaf.shape)}"
            )
    if not partial:
        arrays |= {name: "only in the checkpoint" for name in stored if name not in abstract}
    if not keys and not arrays:
        return
    problems = [*keys, *(f"{name}: {problem}" for name, problem in arrays.items())]
    if not keys and all(name.startswith("opt_state/") for name in arrays):
        raise combine(
            problems,
            title=f"checkpoint {checkpoint} was saved with another optimizer than this run's "
            "(optim.name, optim.chain); go back to that one, or begin another --workdir from its "
            "weights alone with train.init_from, not train.fork, which goes on with its moments:",
            listed=3,
        )
    raise combine(
        problems,
        title=f"checkpoint {checkpoint} is of another model than this run's; choose another "
        "--workdir, or the config that it was saved with:",
        listed=10,
    )


def restore_state(
    checkpoint: Checkpoint,
    abstract_state: Any,
    *,
    model: Mapping[str, Any] | None = None,
    partial: bool = False,
    cast: bool = False,
    donated: bool = False,
) -> Any:
    """Fill a tree like `abstract_state` from one checkpoint, bit for bit.

    abstract_state: leaves are `jax.ShapeDtypeStruct`; each array is read straight into the
    leaf's sharding, whatever mesh or device count saved it; without a sharding it becomes a NumPy
    array. model: the model section of the config, compared with the one in the meta.
    partial: the checkpoint may hold more arrays than are wanted (weights without optimizer).
    cast: arrays of another dtype are converted to the wanted one, part by part as they are read.
    donated: the arrays will be donated to a jitted function; see `array_from_parts`. Where devices
    have memory of their own, the host holds one part of one array at a time.
    Raises UserError, before reading, when the checkpoint is damaged, or of another model or
    optimizer. To be called by all processes.
    """
    abstract = named_leaves(abstract_state)
    check_same_model(checkpoint, abstract, model=model, partial=partial, cast=cast)
    checkpoint.verify()

    def restored(name: str, leaf: Any) -> Any:
        stored = checkpoint.array(name)
        if leaf.sharding is None:
            return stored.read(tuple(slice(0, n) for n in leaf.shape), leaf.dtype)
        read = functools.partial(stored.read, dtype=leaf.dtype)
        return array_from_parts(leaf, read, donated=donated)

    try:
        leaves = {name: restored(name, leaf) for name, leaf in abstract.items()}
    except DamagedError as error:
        raise _damaged(checkpoint.directory, str(error)) from None
    return rebuild(abstract_state, leaves)
