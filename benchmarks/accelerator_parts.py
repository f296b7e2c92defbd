"""What `accelerator.py` measures: parts in order of importance, and the functions behind them.

A part is a list of results with names. Its function takes a name and returns what was found, as
JSON. It runs in a process of its own, so that a crash or a program that hangs costs one result.
"""

import dataclasses
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step import OPTIM, DoesNotFit, StepFlags, measured  # the script beside this one

from llamajax.errors import UserError

Found = dict[str, Any]
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax",
    "orbax-checkpoint", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12",
)  # fmt: skip
_REPEATS = 3  # the least of so many means is a kernel's time
_DIFFERENCE = 0.02  # of a bfloat16 kernel from float32, as a share of the norm


@dataclasses.dataclass(frozen=True)
class Part:
    """One part. needs_s: time below which a result is not begun; limit_s: that of the whole part.

    names: of its results, for the sizes `card` and `tiny`.
    """

    name: str
    needs_s: float
    limit_s: float
    names: Callable[[str], list[str]]
    measure: Callable[["Child", str], Found]


class Child:
    """What the results of one part share: the size, and the machine and state made for the first.

    left_s: the time left. backend: flags of `train_step.py` and the doctor that choose a backend.
    """

    def __init__(
        self, size: str, *, left_s: Callable[[], float], output: Path, backend: dict[str, Any]
    ):
        self.size, self.left_s, self.output, self.backend = size, left_s, output, backend
        self.state: Any = None
        self._machine: Any = None

    @property
    def machine(self) -> Any:
        """The backend, started when it is first needed."""
        if self._machine is None:
            from llamajax import backends
            from llamajax.config.schema import BackendConfig

            given = {"name" if k == "backend" else k: v for k, v in self.backend.items()}
            self._machine = backends.start(BackendConfig(**given))
        return self._machine


def environment(child: Child, _: str) -> Found:
    """Versions, devices, memories."""
    import jax

    from llamajax.backends import machine_profile

    return machine_profile(child.machine) | {
        "python": sys.version.split()[0],
        "packages": versions(),
        "num_devices": child.machine.num_devices,
        "compute_capability": child.machine.compute_capability,
        "memory_stats": jax.local_devices()[0].memory_stats(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that are installed among PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Rows, tokens, query heads, kv heads, head size, documents a row (0: no ids), padding at the end.
_PARITY = {
    "card": (
        (2, 512, 8, 8, 128, 4, True),
        (2, 512, 8, 2, 64, 4, True),
        (1, 4096, 32, 8, 128, 20, True),
        (2, 4096, 32, 32, 128, 1, False),
        (2, 1001, 6, 2, 80, 5, True),
        (2, 512, 8, 2, 128, 0, False),
        (4, 256, 4, 4, 64, 8, False),  # exactly cuDNN's room for documents
    ),
    "tiny": ((2, 96, 4, 2, 16, 3, True), (2, 64, 4, 4, 16, 0, False)),
}


def _parity_cases(size: str) -> dict[str, tuple]:
    words = "B{} T{} N{} K{} H{}, {} document(s){}"
    return {
        words.format(*case[:-1], ", padding" if case[-1] else ""): case for case in _PARITY[size]
    }


def parity(child: Child, name: str) -> Found:
    """The best attention kernel in bfloat16 beside plain attention in float32 at full precision.

    Relative errors of the output and the three gradients, those of plain attention in bfloat16 for
    comparison, and whether a second call gives the same bits.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from attention import value_and_grads  # the script beside this one

    from llamajax.ops.attention import best_attention

    B, T, N, K, H, documents, padding = _parity_cases(child.size)[name]
    rng = np.random.default_rng(B + T + N + K + H + documents)
    arrays = [jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.bfloat16) for n in (N, K, K, N)]
    ids = None
    if documents:
        cuts = np.sort([rng.choice(T - 1, documents - 1, replace=False) + 1 for _ in range(B)])
        ids_BT = 1 + (np.arange(T) >= cuts[:, :, None]).sum(axis=1)
        ids_BT[:, T - (T // 7 if padding else 0) :] = 0
        ids = jnp.asarray(ids_BT, jnp.int32)
    impl = best_attention(child.machine, "bfloat16", H, T).impl

    def run(impl: str, dtype: str) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            step, (q, k, v, do) = jax.jit(value_and_grads(impl)), (x.astype(dtype) for x in arrays)
            calls = [step(q, k, v, ids, do) for _ in range(2)]
        return [[np.asarray(x, np.float64) for x in found] for found in jax.device_get(calls)]

    (want, _), (got, again), (plain, _) = (
        run("xla", "float32"),
        run(impl, "bfloat16"),
        run("xla", "bfloat16"),
    )

    def errors(found: list[np.ndarray]) -> dict[str, float]:
        pairs = zip(("o", "dq", "dk", "dv"), found, want, strict=True)
        return {n: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for n, a, b in pairs}

    found = errors(got)
    return {
        "attention": impl,
        "errors": found,
        "errors_of_plain_bfloat16": errors(plain),
        "same_bits_twice": all((a == b).all() for a, b in zip(got, again, strict=True)),
        "right": all(error <= _DIFFERENCE for error in found.values()),  # false for NaN
    }


# Products of Llama2-7B at 8,192 tokens (rows x inner x columns), and its attention (B, T, N, K, H).
_PRODUCTS = {
    "card": ((8192, 4096, 11008), (8192, 11008, 4096), (8192, 4096, 4096), (4096, 4096, 32000)),
    "tiny": ((128, 64, 96),),
}
_ATTENTION = {
    "card": ((2, 4096, 32, 32, 128), (2, 4096, 32, 8, 128)),
    "tiny": ((2, 64, 4, 2, 16),),
}
_UPDATED = {"card": 1 << 28, "tiny": 1 << 16}  # weights of the optimizer's kernel


def _kernels(size: str) -> dict[str, Callable[[Child], tuple[Callable, tuple, float, float]]]:
    """Kernels by name; each gives a function, its arguments, FLOPs and bytes of memory."""
    found: dict[str, Callable] = {}
    for M, K, N in _PRODUCTS[size]:
        found[f"product {M}x{K}x{N}"] = lambda _, s=(M, K, N): _product(*s, out="bfloat16")
    M, K, N = _PRODUCTS[size][0]
    found[f"weight gradient {K}x{M}x{N}, float32 out"] = lambda _: _product(K, M, N, out="float32")
    for shape in _ATTENTION[size]:
        for documents in (1, 4):
            for backward in (False, True):
                words = "forward and backward" if backward else "forward"
                name = f"attention {'x'.join(map(str, shape))}, {documents} document(s), {words}"
                found[name] = lambda child, s=shape, d=documents, b=backward: _attention(
                    child, s, documents=d, backward=b
                )
    return found | {
        "AdamW update": lambda child: _update(child.size),
        "copy": lambda child: _copy(child.size),
    }


def kernels(child: Child, name: str) -> Found:
    """A kernel's time beside its roofline: the larger of FLOPs / peak and bytes / bandwidth."""
    import jax

    from llamajax.backends.devices import find

    function, given, flops, moved = _kernels(child.size)[name](child)
    step = jax.jit(function).lower(*given).compile()
    jax.block_until_ready(step(*given))
    start = time.perf_counter()
    jax.block_until_ready(step(*given))
    calls = max(1, min(20, int(0.5 / max(time.perf_counter() - start, 1e-6))))
    means = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            out = step(*given)
        jax.block_until_ready(out)
        means.append((time.perf_counter() - start) / calls)
    device, least_s = find(child.machine.device_kind), min(means)
    roofline_s = device and max(flops / device.bfloat16, moved / device.hbm_bytes_per_s)
    return {
        "ms": least_s * 1e3,
        "flops_per_s": flops / least_s,
        "bytes_per_s": moved / least_s,
        "roofline_ms": roofline_s and roofline_s * 1e3,
        "roofline_share": roofline_s and roofline_s / least_s,
    }


def _random(*shape: int) -> Any:
    import jax

    return jax.random.normal(jax.random.key(math.prod(shape) % 97), shape, "bfloat16")


def _product(M: int, K: int, N: int, *, out: str) -> tuple[Callable, tuple, float, float]:
    import jax.numpy as jnp

    moved = 2 * (M * K + K * N) + jnp.dtype(out).itemsize * M * N

    def multiply(a, b):
        return jnp.dot(a, b, preferred_element_type=out)

    return multiply, (_random(M, K), _random(K, N)), 2 * M * K * N, moved


def _attention(
    child: Child, shape: tuple, *, documents: int, backward: bool
) -> tuple[Callable, tuple, float, float]:
    import jax.numpy as jnp
    from attention import value_and_grads  # the script beside this one

    from llamajax.ops.attention import attention, best_attention

    B, T, N, K, H = shape
    impl = best_attention(child.machine, "bfloat16", H, T).impl
    ids = jnp.broadcast_to(1 + jnp.arange(T, dtype=jnp.int32) * documents // T, (B, T))
    q, k, v = _random(B, T, N, H), _random(B, T, K, H), _random(B, T, K, H)

    def forward(q, k, v, ids):
        return attention(q, k, v, impl=impl, segment_ids_BT=ids)

    products = 2 * B * T * T * N * H / documents  # the causal half of two products, no other tile
    passes = 3.5 if backward else 1.0  # the scores are computed once more in the backward pass
    moved = (2 if not backward else 6) * (q.nbytes + k.nbytes)
    return (
        (value_and_grads(impl) if backward else forward),
        (q, k, v, ids),
        passes * products,
        moved,
    )


def _update(size: str) -> tuple[Callable, tuple, float, float]:
    """One step of the optimizer for a matrix: weight, gradient and two moments, float32."""
    import jax.numpy as jnp

    from llamajax import optim
    from llamajax.config.schema import OptimConfig

    optimizer = optim.build(OptimConfig(**OPTIM), steps=10)
    w = {"w": jnp.ones((_UPDATED[size] // 64, 64), jnp.float32)}
    state = optimizer.init(w)

    def update(w, grads, state):
        return optim.apply(optimizer, grads, state, w, step=jnp.int32(3))

    return update, (w, w, state), 0.0, 7 * 4 * _UPDATED[size]


def _copy(size: str) -> tuple[Callable, tuple, float, float]:
    import jax.numpy as jnp

    x = jnp.ones(_UPDATED[size] * 4, jnp.bfloat16)
    return (lambda x: x + 1), (x,), 0.0, 2 * x.nbytes


# Results by the flags of `train_step.py` that repeat them; --batch is that of one device.
_LLAMA = "--seq_len=4096 --dtype=bfloat16 --steps=5"
_STEPS = {
    "card": {
        "7b": (
            f"--preset=llama2-7b --batch=4 --remat=save_attention {_LLAMA}",
            f"--preset=llama2-7b --batch=2 --remat=dots {_LLAMA}",
            # the microbatches of configs/llama2_7b_1gpu.py
            f"--preset=llama2-7b --batch=4 --accumulation=2 --remat=dots {_LLAMA}",
        ),
        "7b_bfloat16_moment": (
            f"--preset=llama2-7b --batch=3 --remat=dots --moment_dtype=bfloat16 {_LLAMA}",
        ),
        "1b": (
            f"--preset=llama3.2-1b --batch=8 --remat=save_attention {_LLAMA}",
            f"--preset=llama3.2-1b --batch=8 --remat=dots {_LLAMA}",
            f"--preset=llama3.2-1b --batch=8 --remat=dots --documents=8 {_LLAMA}",
        ),
        "32m": (
            "--preset=bench-32m --batch=64 --seq_len=512 --dtype=bfloat16 --steps=20",
            "--preset=bench-32m --batch=4 --seq_len=512 --dtype=float32 --steps=20",
        ),
    },
    "tiny": {
        "7b": (
            "--preset=tiny --batch=2 --seq_len=32 --dtype=bfloat16 --steps=2",
            "--preset=tiny --batch=2 --seq_len=32 --remat=save_attention --steps=2",
        ),
        "7b_bfloat16_moment": (
            "--preset=tiny --batch=2 --seq_len=32 --moment_dtype=bfloat16 --steps=2",
        ),
        "1b": ("--preset=tiny --batch=2 --seq_len=64 --documents=4 --steps=2",),
        "32m": ("--preset=tiny --batch=4 --seq_len=16 --steps=2",),
    },
}


def _step(child: Child, name: str) -> Found:
    """One setting of the training step; the state of the one before is used again."""
    flags = StepFlags.parse(name.split())
    batch = flags.batch * child.machine.num_devices
    flags = dataclasses.replace(flags, batch=batch, **child.backend)
    state, child.state = child.state, None
    try:
        found, run = measured(flags, state=state)
    except DoesNotFit:
        child.state = state  # as it was: nothing has run
        raise
    child.state = run.state
    return found


def doctor(child: Child, _: str) -> Found:
    """The verdict of `llamajax.doctor`, which starts a process for each probe that needs one."""
    file, limit_s = child.output / "doctor.json", max(20.0, child.left_s() / 4)
    command = [sys.executable, "-m", "llamajax.doctor", f"--json={file}", f"--timeout_s={limit_s}"]
    taken = ("backend", "plugin", "options", "num_cpu_devices")
    command += [f"--{k}={v}" for k, v in child.backend.items() if k in taken]
    with (child.output / "doctor.txt").open("wb") as text:  # also if its time is too short
        done = subprocess.run(command, stdout=text, check=False)
    if done.returncode not in (0, 1):
        raise UserError(f"llamajax.doctor ended with exit code {done.returncode}")
    found = json.loads(file.read_text("utf-8"))
    probes = found["probes"]
    return {
        "verdict": found["verdict"],
        "repairs": found["repairs"],
        "counts": {
            s: sum(p["status"] == s for p in probes) for s in ("pass", "fail", "unsupported")
        },
        "failed": {p["name"]: p["message"] for p in probes if p["status"] == "fail"},
    }


def _steps(name: str, *, needs_s: float, limit_s: float) -> Part:
    return Part(name, needs_s, limit_s, lambda size: list(_STEPS[size][name]), _step)


PARTS = (
    Part("environment", 5, 90, lambda size: ["devices and versions"], environment),
    Part("parity", 10, 90, lambda size: list(_parity_cases(size)), parity),
    _steps("7b", needs_s=40, limit_s=150),
    _steps("7b_bfloat16_moment", needs_s=40, limit_s=90),
    Part("kernels", 10, 90, lambda size: list(_kernels(size)), kernels),
    _steps("1b", needs_s=25, limit_s=90),
    _steps("32m", needs_s=15, limit_s=60),
    Part("doctor", 40, 300, lambda size: ["doctor"], doctor),
)
