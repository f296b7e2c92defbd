"""Properties of platforms, of those that are known and of those that are not."""

import jax
import jax.numpy as jnp

from llamajax import backends
from llamajax.backends.platforms import PLATFORMS, platform_facts


def test_fused_kernels_come_first_where_they_are_built_for_the_platform():
    fused = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    fused |= dict.fromkeys(("cpu", "rocm", "npu"))
    for name, kernel in fused.items():
        found = platform_facts(name).attention_preferences
        assert found == (*filter(None, [kernel]), "blocked", "split", "xla")
    assert backends.platform_of_attention("cudnn") == "cuda"
    assert backends.platform_of_attention("blocked") is None


def test_nothing_is_taken_for_granted_of_an_unknown_platform():
    found, cpu = platform_facts("npu"), platform_facts("cpu")
    assert found.names == ("npu",)
    assert found.may_alias_host_memory
    for name in ("is_known_to_jax", "is_deterministic", "is_host"):
        assert (getattr(found, name), getattr(cpu, name)) == (False, True)
    assert (found.dtype, cpu.dtype) == ("bfloat16", "float32")


def test_each_name_belongs_to_one_platform_and_each_says_its_source():
    names = [name for entry in PLATFORMS for name in entry.names]
    assert len(names) == len(set(names))
    assert all(entry.source and entry.tested for entry in PLATFORMS)


def test_an_argument_that_is_not_read_is_not_counted_as_donated():
    step = jax.jit(lambda a, nothing, b, c: (a + 1, c), donate_argnums=(0, 1, 2))
    compiled = step.lower(jnp.ones(4), None, jnp.ones(8), jnp.ones(2)).compile()
    given, _ = backends.donated_bytes(compiled)
    assert given == 16
