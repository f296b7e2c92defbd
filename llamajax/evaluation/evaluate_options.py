"""The options of `evaluate`, checked as far as that needs no model and no machine. Free of jax."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

from llamajax.config.schema import BackendConfig, ComputeDtype
from llamajax.errors import combine

Protocol = Literal["non_overlapping", "sliding_window"]
SOURCES = ("data", "text", "token_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The flags of `evaluate` by name, None where one was not given."""

    checkpoint: str
    backend: BackendConfig
    data: str | None = None
    text: str | None = None
    token_ids: str | None = None
    split: str | None = None
    protocol: Protocol | None = None
    seq_len: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    max_batches: int | None = None
    per_token_nll: str | None = None
    dtype: ComputeDtype | None = None
    mesh: str | None = None

    @property
    def source(self) -> str:
        """Which of SOURCES was given."""
        return next(name for name in SOURCES if getattr(self, name) is not None)


def check_options(options: EvaluateOptions) -> None:
    """Raise one UserError with every flag that is missing, out of range or of another source."""
    given = [f"--{name}" for name in SOURCES if getattr(options, name) is not None]
    problems = []
    if len(given) != 1:
        problems.append(
            f"{' and '.join(given) or 'no source'} given: name exactly one of --data=PREPARED, "
            "--text=FILE and --token_ids=FILE.npy"
        )
    problems += [
        f"--{name}={getattr(options, name)}: must be at least 1"
        for name in ("seq_len", "stride", "batch_size", "max_batches")
        if getattr(options, name) is not None and getattr(options, name) < 1
    ]
    if len(given) == 1:
        problems += _other_source_problems(options)
    if options.stride is not None and options.protocol != "sliding_window":
        problems.append("--stride belongs to --protocol=sliding_window")
    if options.per_token_nll is not None:
        problems += _write_problems(options.per_token_nll)
    if problems:
        raise combine(problems, title="this evaluation cannot be made:")


def _other_source_problems(options: EvaluateOptions) -> list[str]:
    serves = {"split": ("data",), "protocol": ("text",), "seq_len": ("data", "text")}
    problems = [
        f"--{name}={getattr(options, name)} does not go with --{options.source}: it belongs to "
        + " and ".join(f"--{source}" for source in sources)
        for name, sources in serves.items()
        if getattr(options, name) is not None and options.source not in sources
    ]
    if options.source == "token_ids" and options.per_token_nll and options.max_batches:
        problems.append(
            "--max_batches with --per_token_nll: the file has one value for each token of "
            "--token_ids; give fewer rows instead"
        )
    return problems


def _write_problems(path: str) -> list[str]:
    """Why no file can be written there; known before the work and not after it."""
    file = Path(path)
    folder = file.absolute().parent
    if file.is_dir():
        return [f"--per_token_nll={path}: is a directory; name a file"]
    if not folder.is_dir():
        return [f"--per_token_nll={path}: there is no directory {folder}; make it first"]
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions do not show a full disk
            return []
    except OSError as error:
        return [f"--per_token_nll={path}: {folder} cannot be written: {error.strerror}"]
