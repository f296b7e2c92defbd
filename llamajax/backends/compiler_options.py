"""Choose the options that XLA compiles a step with, program by program.

Precedence: `backend.compiler_options`, the user's XLA_FLAGS and LIBTPU_INIT_ARGS, the table by
platform and kind of device (`platforms.py`). To the user's list of passes that are turned off the
table's entries are added; an empty list of the user's turns the table's off. In
`backend.compiler_options` `+` stands between entries. XLA aborts on a flag that it does not know;
an option of one program that it does not know is an error that can be caught. So each release
takes of the table what it knows.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.backends import devices
from llamajax.backends.platforms import LAYER_BYTES, platform_facts
from llamajax.backends.plugin import Option, typed_options
from llamajax.errors import UserError

COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_PASSES = "xla_disable_hlo_passes"  # a list: what the user and the table name counts together
_REFUSED = re.compile(r"No such compile option: '(\w+)'|While setting option (\w+),")
_LEAST_LAYER_BYTES = 2**30  # of small layers several are combined, as in published recipes


@dataclasses.dataclass(frozen=True)
class CompilerOptions:
    """Options for `lowered.compile`, by name. refused: of the table, by what XLA said to it."""

    values: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compile a program with these options."""
        return lowered.compile(compiler_options=dict(self.values) or None)

    def warnings(self) -> Iterator[str]:
        """Yield a line about what XLA refused."""
        if self.refused:
            yield (
                f"the compiler of jaxlib {jax.lib.__version__} does not know "
                f"{', '.join(self.refused)}: left out, with the options that serve beside it, so "
                "that the step may be slower, or not repeat its bits"
            )


def compiler_flags(environment: Mapping[str, str] | None = None) -> str:
    """Return the flags that change compiled programs, sorted; those that only dump are left out.

    environment: None is that of this process.
    """
    found = environment if environment is not None else os.environ
    flags = " ".join(found.get(name, "") for name in COMPILER_VARIABLES).split()
    return " ".join(sorted(flag for flag in flags if not flag.startswith("--xla_dump")))


def choose_compiler_options(
    asked: str | None,
    *,
    platform: str,
    device: Any,
    layer_bytes: float,
    deterministic: bool = False,
) -> CompilerOptions:
    """Return the options for a step on this platform.

    asked: `backend.compiler_options`. device: to compile for, present or not. layer_bytes: of one
    layer's weights in float32, whole but for what `tensor` splits. deterministic: with what makes
    the platform repeat its bits. Raises UserError where the compiler refuses an option that was
    asked for.
    """
    own = typed_options(asked, key="backend.compiler_options")
    if own.get(_PASSES):
        own[_PASSES] = str(own[_PASSES]).replace("+", ",")
    if own and (found := _refusal(own, device)):
        raise UserError(
            f"backend.compiler_options = {asked}: the compiler refuses it: {found[1]}; correct the "
            "name or value, or leave it out"
        )
    flags = " ".join(os.environ.get(name, "") for name in COMPILER_VARIABLES)
    given = dict(re.findall(r"--(\w+)(?:=(\S*))?", flags)) | own
    least, refused = max(_LEAST_LAYER_BYTES, int(layer_bytes)), {}
    values: dict[str, Option] = {}
    facts, entry = platform_facts(platform), devices.find(device.device_kind)
    groups = facts.compiler_options + facts.kind_options.get(entry.name if entry else "", ())
    for group in groups + (facts.deterministic_options if deterministic else ()):
        left = {
            name: least if value == LAYER_BYTES else value
            for name, value in group.items()
            if name not in given
        }
        if _PASSES in group and given.get(_PASSES):
            left[_PASSES] = f"{given[_PASSES]},{group[_PASSES]}"
        if left and (found := _refusal(left, device)):
            refused[found[0]] = found[1]
        else:
            values |= left
    return CompilerOptions(own | values, refused)


def _refusal(options: Mapping[str, Option], device: Any) -> tuple[str, str] | None:
    """Return the option that XLA does not take, and why, by compiling the smallest program."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding))
    try:
        program.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        found = _REFUSED.search(str(error))
        if not found:
            raise
        return found[1] or found[2], str(error).splitlines()[0]
    return None
