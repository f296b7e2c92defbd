"""What a key's type does not fix: the form of a text, names out of a list.

Each function raises Mistyped with what is wrong; those that parse return what they read. A key
names one as its `check`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from llamajax.config.values import Mistyped
from llamajax.errors import did_you_mean, nearest
from llamajax.files import write_problem


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. An IPv6 host is in brackets, which it keeps."""
    found = re.fullmatch(r"([^\s/:\[\]]+|\[[\w:.%]+\]):(\d+)", text)
    if found and 0 < int(found[2]) < 65536:
        return found[1], int(found[2])
    host, _, port = text.rpartition(":")
    is_bare = re.fullmatch(r"[0-9a-fA-F.]*(:[0-9a-fA-F.]*){2,}", host)
    fix = f"an IPv6 address is in brackets: [{host}]:{port}" if is_bare else "e.g. node0:8476"
    raise Mistyped(f"is not HOST:PORT, {fix}")


def parse_fork(text: str) -> tuple[Path, int]:
    """Return the --workdir and the step of RUN@STEP."""
    run, _, step = text.rpartition("@")
    if run and re.fullmatch(r"\d+", step) and int(step):
        return Path(run), int(step)
    raise Mistyped("is not RUN@STEP, e.g. runs/base@1000: a --workdir and the step to go on from")


def parse_steps(text: str) -> tuple[int, int]:
    """Return first and last step of `20:25`."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found and 2 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise Mistyped("is not FIRST:LAST, e.g. 20:25, from step 2 on")


def check_options(text: str) -> None:
    """Take k=v,k=v."""
    for part in text.split(","):
        name, equals, _ = part.partition("=")
        if not name.strip() or not equals:
            raise Mistyped(f"{part!r} is not k=v; write k=v,k=v")


def check_prepared(text: str) -> None:
    """Take names of prepared directories, separated by commas."""
    if not all(name.strip() for name in text.split(",")):
        raise Mistyped(
            "has an empty name; give a directory written by `llamajax prepare`, or several "
            "separated by single commas"
        )


def check_validation(sets: Mapping[str, str]) -> None:
    """Take one directory for each name."""
    for name, path in sets.items():
        if not path.strip() or "," in path:
            raise Mistyped(f"{name} = {path!r} must be one directory, without a comma")


def check_store(text: str) -> None:
    """Take a path, or a folder of a bucket."""
    if not text.strip():
        raise Mistyped("is empty; name a directory, or set it to none")
    if "://" in text and not re.fullmatch(r"(gs|s3)://[^/]+/+[^/].*", text):
        raise Mistyped("is not a path, nor gs://BUCKET/FOLDER, nor s3://BUCKET/FOLDER")


def check_output(file: str) -> None:
    """Take the path of a file to write."""
    path = Path(file).absolute()
    if path.is_dir():
        raise Mistyped("is a directory; name a file")
    if not path.parent.is_dir():
        raise Mistyped("there is no directory to write it in")
    if problem := write_problem(path.parent):
        raise Mistyped(f"{path.parent} cannot be written: {problem}")


def check_temperature(value: float) -> None:
    """Take 0, or what a logit can be divided by."""
    if 0 < value < 1e-6:
        raise Mistyped("must be 0 (the most probable token) or at least 1e-6")


def not_empty(fix: str) -> Callable[[str], None]:
    """Make a check that takes any text but an empty one."""

    def check(text: str) -> None:
        if not text.strip():
            raise Mistyped(f"is empty; {fix}")

    return check


def among(known: Collection[str]) -> Callable[[Collection[str]], None]:
    """Make a check that takes some of these names, each once."""

    def check(names: tuple[str, ...]) -> None:
        for name in names:
            if name not in known:
                hint = did_you_mean(nearest(name, known)) or "."
                raise Mistyped(f"unknown name {name!r}{hint} They are {', '.join(known)}")
            if names.count(name) > 1:
                raise Mistyped(f"{name} is there {names.count(name)} times; name it once")

    return check
