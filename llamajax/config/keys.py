"""The keys that the schema declares, as one flat table from path to type, default and doc."""

import dataclasses
import functools
import typing
from typing import Any

from llamajax.config.schema import RunConfig
from llamajax.config.values import describe, split_optional


class NotSet:
    """The marker of a required key that nobody has set yet."""

    def __repr__(self) -> str:
        return "<not set>"

    def __bool__(self) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "NotSet":
        return self

    def __copy__(self) -> "NotSet":
        return self

    def __reduce__(self) -> str:
        return "NOT_SET"


NOT_SET = NotSet()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the schema; `default` is NOT_SET where the config file must give it."""

    path: str
    annotation: Any
    default: Any
    doc: str

    @property
    def type_words(self) -> str:
        """The type as a user reads it."""
        return describe(self.annotation)


def nested_class(annotation: Any) -> type | None:
    """The dataclass that an annotation holds (`RopeScaling | None` -> RopeScaling), or None."""
    inner, _ = split_optional(annotation)
    return inner if dataclasses.is_dataclass(inner) else None


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass's fields, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, or NOT_SET."""
    return NOT_SET if field.default is dataclasses.MISSING else field.default


def sections() -> dict[str, type]:
    """The sections of a run: name to dataclass, in the schema's order."""
    return annotations(RunConfig)


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every key of the schema by path, in its order; `model.rope_scaling` before its own keys."""
    table: dict[str, Key] = {}
    for section, cls in sections().items():
        _collect(cls, prefix=f"{section}.", table=table)
    return table


def _collect(cls: type, *, prefix: str, table: dict[str, Key]) -> None:
    for field in dataclasses.fields(cls):
        annotation = annotations(cls)[field.name]
        path = prefix + field.name
        table[path] = Key(
            path=path,
            annotation=annotation,
            default=default_of(field),
            doc=field.metadata["doc"],
        )
        if inner := nested_class(annotation):
            _collect(inner, prefix=f"{path}.", table=table)
