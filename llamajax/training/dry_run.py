"""What `train --dry_run` prints: the run as it would begin here. Nothing is compiled or written."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from llamajax.checkpoint.directory_owner import checkpoint_directory
from llamajax.checkpoint.manifest import complete_steps
from llamajax.config import RunConfig
from llamajax.config.saved_config import origins
from llamajax.models.memory import held_parts
from llamajax.monitoring.progress import format_count
from llamajax.training.messages import gib, run_header
from llamajax.training.setup import Setup, set_up

_WIDTH = 44


def dry_run(config: RunConfig, *, workdir: Path, overrides: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines: every value with its origin first, then what needs machine and data.

    overrides: of the command line, by path. Raises UserError where `train` would.
    """
    for path, value, origin in origins(config, overrides):
        yield f"{f'{path} = {value}':<{_WIDTH}}  # {origin}"
    yield ""
    setup = set_up(config)
    steps = complete_steps(checkpoint_directory(workdir, config.checkpoint.directory))
    yield from run_header(setup, steps[-1] if steps else 0)
    yield f"kernels  attention {setup.attention.impl}: {setup.attention.reason}"
    options = setup.compiler_options.values.items()
    yield f"compiler {', '.join(f'{name}={value}' for name, value in options) or 'no options'}"
    yield _epochs(setup)
    yield _memory(setup)


def _epochs(setup: Setup) -> str:
    c, sources = setup.config, setup.mixture.sources
    read = c.train.steps * c.data.global_batch_size * c.data.seq_len
    shares = [weight / sum(setup.mixture.weights) for weight in setup.mixture.weights]
    epochs = ", ".join(
        f"{read * share / source.num_tokens:.3g} of {source.path} "
        f"({format_count(source.num_tokens)} tokens)"
        for source, share in zip(sources, shares, strict=True)
    )
    return f"epochs   {epochs}; {format_count(read)} tokens in {c.train.steps} steps"


def _memory(setup: Setup) -> str:
    parts = held_parts(setup.config, dict(setup.mesh.shape))
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    total = gib(sum(parts.values()))
    return f"memory   {total} a device at least, by formula: {listed}; `llamajax plan` has more"
