"""JAX's warning of every platform that is not its own."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def no_experimental_warning() -> Iterator[None]:
    """Drop JAX's warning that a platform is experimental: a run's own lines say more about it."""
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(_is_other)
    try:
        yield
    finally:
        logger.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return "is experimental" not in record.getMessage()
