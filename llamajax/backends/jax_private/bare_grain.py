"""grain without Orbax, which it imports if it finds it, for handlers that are not used here.

That import takes a third of a second, and a run needs Orbax no sooner than at its first save. A
grain that cannot be imported without Orbax is imported with it. Before jax 0.10.2 grain logs a
warning about profiling, which is not used here.
"""

import sys

from absl import logging

_NOT_NOW = "orbax.checkpoint"

_logger = logging.get_absl_logger()
_was_disabled, _logger.disabled = _logger.disabled, True
_hides = _NOT_NOW not in sys.modules
if _hides:
    sys.modules[_NOT_NOW] = None  # `import` then says that there is no such module
try:
    import grain
    from grain.experimental import index_shuffle
except ImportError:
    if not _hides:
        raise
    del sys.modules[_NOT_NOW]
    import grain
    from grain.experimental import index_shuffle
finally:
    _logger.disabled = _was_disabled
    if _hides and sys.modules.get(_NOT_NOW, _NOT_NOW) is None:
        del sys.modules[_NOT_NOW]

__all__ = ["grain", "index_shuffle"]
