"""Which compilers for absent devices are installed (the extras plan-tpu and plan-gpu)."""

from importlib.util import find_spec

import pytest

HAS_TPU = find_spec("libtpu") is not None
HAS_CUDA = bool(find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13"))
needs_tpu = pytest.mark.skipif(not HAS_TPU, reason="needs the extra plan-tpu")
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs JAX's CUDA plugin")
