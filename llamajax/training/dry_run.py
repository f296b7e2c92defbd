"""What `train --dry_run` prints: the run as it would begin here. Nothing is written."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from llamajax.config import RunConfig
from llamajax.config.saved_config import origins
from llamajax.models.memory import held_parts
from llamajax.monitoring.row_format import format_size
from llamajax.training.initial_state import check_stored
from llamajax.training.messages import run_header
from llamajax.training.run_start import first_start
from llamajax.training.setup import Setup, set_up
from llamajax.training.workdir import read_run

_WIDTH = 44


def dry_run(config: RunConfig, *, workdir: Path, overrides: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines: every value with its origin first, then what needs machine and data.

    overrides: of the command line, by path. Raises UserError where `train` would.
    """
    for path, value, origin in origins(config, overrides):
        yield f"{f'{path} = {value}':<{_WIDTH}}  # {origin}"
    yield ""
    setup = set_up(config, keep_programs=False)
    with read_run(setup, workdir) as run:
        start, _ = first_start(run)
    if start.checkpoint is not None:
        check_stored(setup.at(start.step), start.checkpoint)
    yield from run_header(setup, start.position, start.step)
    yield f"kernels  attention {setup.attention.impl}: {setup.attention.reason}"
    options = setup.compiler_options.values.items()
    yield f"compiler {', '.join(f'{name}={value}' for name, value in options) or 'no options'}"
    yield _memory(setup)


def _memory(setup: Setup) -> str:
    sizes = dict(setup.mesh.shape)
    parts = max(
        (held_parts(stage.config, sizes) for _, stage in setup.stages),
        key=lambda p: sum(p.values()),
    )
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
    total = format_size(sum(parts.values()))
    return f"memory   {total} a device at least, by formula: {listed}; `llamajax plan` has more"
