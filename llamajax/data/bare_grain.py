"""Grain without Orbax, which it imports, where it finds it, for handlers that are not used here.

That import takes a third of a second, and a run needs Orbax no sooner than at its first save.
"""

import sys

_NOT_NOW = "orbax.checkpoint"

_hides = _NOT_NOW not in sys.modules
if _hides:
    sys.modules[_NOT_NOW] = None  # `import` then says that there is no such module
try:
    import grain
    from grain.experimental import index_shuffle
finally:
    if _hides:
        del sys.modules[_NOT_NOW]

__all__ = ["grain", "index_shuffle"]
