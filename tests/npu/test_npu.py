"""The test NPU itself: its identity, its memory, and each fault as JAX meets it.

Faults by operation lie in different programs, so one process sees most of them. What ends or
poisons a process has one of its own.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import warm

_START = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from llamajax import backends
from llamajax.config.schema import BackendConfig
plugin, options = sys.argv[1:]
machine = backends.start(BackendConfig(name="npu", plugin=plugin, options=options))
found = {}

def tried(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"
"""
_FAULTY = """
device = jax.devices()[0]
found["identity"] = [device.platform, device.device_kind, machine.platform_version, str(device)]
found["num_devices"] = len(jax.devices())
with jax.enable_x64(True):
    found["float64"] = tried(lambda: jax.device_put(np.ones(2), device))
found["refused"] = tried(lambda: jax.jit(jnp.sort)(np.ones(3, np.float32)))
found["statistics"] = tried(lambda: device.memory_stats()["bytes_in_use"])
ones = np.ones((4, 4), np.float32)
multiply = jax.jit(lambda x: x @ x)
found["product32"] = float(multiply(ones)[0, 0])
found["product16"] = float(multiply(ones.astype(jnp.bfloat16)).astype(jnp.float32)[0, 0])
mesh = jax.make_mesh((4,), ("a",))
x = jax.device_put(np.arange(4, dtype=np.float32), jax.NamedSharding(mesh, jax.P("a")))
shard = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=jax.P("a"), out_specs=out))
found["sum"] = np.asarray(shard(lambda x: jax.lax.psum(x, "a"), jax.P())(x)).tolist()
gather = lambda x: jax.lax.all_gather(x, "a", tiled=True)[None]
found["gather"] = np.asarray(shard(gather, jax.P("a"))(x))[3].tolist()
import threading
hang = jax.jit(lambda x: jnp.sin(x))
thread = threading.Thread(target=lambda: hang(np.ones(3, np.float32)), daemon=True)
thread.start()
thread.join(1.0)
found["hangs"] = thread.is_alive()
print(json.dumps(found), flush=True)
jax.jit(lambda x: jnp.cos(x))(np.ones(3, np.float32))
"""
_HEALTHY = """
device = jax.devices()[0]
found["before"] = device.memory_stats()
x = jax.block_until_ready(jax.device_put(np.ones((256, 256), np.float32), device))
found["one"] = device.memory_stats()["bytes_in_use"] - found["before"]["bytes_in_use"]
del x
found["freed"] = device.memory_stats()["bytes_in_use"] - found["before"]["bytes_in_use"]
big = jax.ShapeDtypeStruct((1024, 1024, 80), jnp.float32)
found["program"] = tried(lambda: jax.jit(lambda x: x + 1).lower(big).compile())
found["array"] = tried(lambda: jax.device_put(np.zeros((1024, 1024, 80), np.float32), device))
from llamajax.backends.jax_private import donation
double = lambda: jax.jit(lambda x: 2 * x, donate_argnums=0)
shape = jax.ShapeDtypeStruct((256,), jnp.float32)
found["alias"] = [double().lower(shape).compile().memory_analysis().alias_size_in_bytes]
donation.enable("npu")
jax.clear_caches()
found["alias"] += [double().lower(shape).compile().memory_analysis().alias_size_in_bytes]
given = jax.device_put(np.ones(256, np.float32), device)
found["doubled"] = float(double()(given).sum())
found["deleted"] = given.is_deleted()
counted = jax.jit(lambda x: x * 3)
y = jax.device_put(np.ones(3, np.float32), device)
for i in range(40):
    found["failure"] = tried(lambda: np.asarray(counted(y)))
    if found["failure"] != "no error":
        break
found["failed_after"] = i
print(json.dumps(found), flush=True)
"""


def in_child(code: str, plugin: Path, options: str) -> tuple[dict, int]:
    """What a program says of the NPU in its last line, and its exit code."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PLATFORMS")}
    command = [sys.executable, "-c", _START + code, str(plugin), options]
    done = warm.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


@pytest.fixture(scope="module")
def faulty(npu):
    options = (
        "num_devices=4,device_kind=Test NPU 9,float64=false,memory_stats=false,"
        "refuse=cholesky+sort,wrong=all_reduce,wrong_matmul=bfloat16,hang=sine,crash=cosine"
    )
    return in_child(_FAULTY, npu, options)


@pytest.fixture(scope="module")
def healthy(npu):
    return in_child(_HEALTHY, npu, "memory_gib=0.25,fail_after=30")[0]


def test_it_has_a_name_of_its_own(faulty):
    platform, kind, version, text = faulty[0]["identity"]
    assert (platform, kind, text) == ("npu", "Test NPU 9", "NpuDevice(id=0)")
    assert version.endswith("llamajax test NPU 1.0")
    assert faulty[0]["num_devices"] == 4


def test_what_it_refuses_comes_as_an_error_that_says_so(faulty):
    assert "float64 is not supported" in faulty[0]["float64"]
    assert "operation sort is not supported" in faulty[0]["refused"]
    assert faulty[0]["statistics"] != "no error"


def test_wrong_numbers_come_from_the_chosen_operations_only(faulty):
    assert faulty[0]["product32"] == 4
    assert faulty[0]["product16"] == 5  # a quarter more
    assert faulty[0]["sum"] == [7.5]
    assert faulty[0]["gather"] == [0, 1, 2, 3]


def test_a_program_hangs_and_another_ends_the_process(faulty):
    found, code = faulty
    assert found["hangs"]
    assert code == -6  # SIGABRT


def test_memory_is_counted_and_limited(healthy):
    assert healthy["before"]["bytes_limit"] == 2**28
    assert healthy["one"] == 4 * 256 * 256
    assert healthy["freed"] == 0
    assert "RESOURCE_EXHAUSTED: program needs 671088640 bytes" in healthy["program"]
    assert "RESOURCE_EXHAUSTED: out of memory" in healthy["array"]


def test_donation_is_there_once_it_is_allowed(healthy):
    assert healthy["alias"] == [0, 1024]
    assert healthy["doubled"] == 512
    assert healthy["deleted"]


def test_it_fails_after_so_many_executions(healthy):
    assert "the vector core failed" in healthy["failure"]
    assert 0 < healthy["failed_after"] < 30


def test_programs_may_be_too_new(npu):
    code = "found['compiled'] = tried(lambda: jnp.ones(3) + 1)\nprint(json.dumps(found))"
    found = in_child(code, npu, "newest_program=0.9.0")[0]
    assert "the newest supported is 0.9.0" in found["compiled"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("memory_gib=2", "option memory_gib is of type float, not int"),
        ("levle=1", "the NPU has no option levle"),
        ("num_devices=0", "no NPU was found on this host"),
        ("donation=maybe", "option donation is honor, ignore or refuse, not maybe"),
    ],
)
def test_options_are_typed_and_checked(npu, options, words):
    """A client of its own each; JAX itself is not needed to make one."""
    assert words in create_client(npu, options)


def create_client(library: Path, options: str) -> str:
    """The message of the error with which the plugin answers these options."""
    from jax._src.lib import xla_client

    from llamajax.backends.plugin import typed_options

    name = f"npu_of_{library.parent.name}"
    if not xla_client.pjrt_plugin_loaded(name):
        xla_client.load_pjrt_plugin_dynamically(name, str(library))
        xla_client.initialize_pjrt_plugin(name)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        xla_client.make_c_api_client(name, typed_options(options), None)
    return str(raised.value)
