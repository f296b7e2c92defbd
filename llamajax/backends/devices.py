"""What is known of each kind of accelerator, as data. An unknown one has no peak: MFU is then null.

Peaks are dense (no sparsity), in FLOP/s, from the makers' data sheets; `source` says which. A chip
of TPU v7x is two devices to JAX, and its figures are halved here; every other chip is one.
"""

import dataclasses
import os

from llamajax.config.schema import ComputeDtype

# Share of a GPU's memory that llamajax lets XLA have. JAX's own default is 0.75; the rest here is
# left to the CUDA context, to NCCL's buffers and to cuDNN's and cuBLAS's workspaces.
GPU_MEMORY_FRACTION = 0.92
_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, found by the beginning of JAX's `device_kind`, or by its short `name`.

    bfloat16, float32: peak FLOP/s of matrix products. memory_bytes: what is on the data sheet;
    xla_bytes: what XLA sees of it, for programs and their arguments (a TPU's own compiler says so
    when it refuses a program; a GPU's is the size that CUDA reports, of which XLA gets a share).
    hbm_bytes_per_s: from the data sheet. fast_bytes_per_s, slow_bytes_per_s: what a device can send
    within its node or torus, and between nodes, in one direction. efficiency: share of the peak
    that large matrix products of training reach; an assumption of predictions, never of an MFU.
    """

    kind: str
    name: str
    bfloat16: float
    float32: float | None
    memory_bytes: int
    xla_bytes: int
    hbm_bytes_per_s: float
    fast_bytes_per_s: float
    slow_bytes_per_s: float | None
    efficiency: float
    source: str

    @property
    def limit_bytes(self) -> int:
        """Memory that a program of llamajax may take of one device, as this environment is set."""
        if not self.kind.startswith("NVIDIA"):
            return self.xla_bytes
        set_by_user = next((os.environ[v] for v in _FRACTION_VARIABLES if os.environ.get(v)), None)
        return int(self.xla_bytes * float(set_by_user or GPU_MEMORY_FRACTION))


_GIB = 2**30
_NVLINK = "NVLink and one network adapter a GPU from the DGX data sheet"
_ICI = "ICI from the Cloud TPU documentation: both directions of a ring over one link each"


def _nvidia(kind: str, *, name: str, peaks: tuple[float, float], **facts: float) -> Device:
    bfloat16, float32 = peaks
    source = f"NVIDIA {kind} data sheet, dense; {_NVLINK}"
    return Device(kind=f"NVIDIA {kind}", name=name, bfloat16=bfloat16, float32=float32,
                  source=source, **facts)  # fmt: skip


def _tpu(kind: str, *, name: str, peak: float, gib: tuple[float, float], hbm: float, link: float,
         efficiency: float) -> Device:  # fmt: skip
    """`gib`: memory, and what XLA sees of it; `link`: bytes/s of one ICI link in one direction."""
    return Device(
        kind=f"TPU {kind}" if kind.startswith("v") else kind,
        name=name,
        bfloat16=peak,
        float32=None,
        memory_bytes=int(gib[0] * _GIB),
        xla_bytes=int(gib[1] * _GIB),
        hbm_bytes_per_s=hbm,
        fast_bytes_per_s=2 * link,
        slow_bytes_per_s=None,
        efficiency=efficiency,
        source=f"Cloud TPU documentation of {name}, per device; {_ICI}",
    )


# Efficiencies are set so that published training runs come out within a tenth or so (MaxText on
# H100, v5p, v6e; benchmarks/results says which); v4, v5e, A100, B200 and v7x are guesses by these.
_HOPPER = {"efficiency": 0.66, "fast_bytes_per_s": 450e9, "slow_bytes_per_s": 50e9}
_V5E = {"name": "v5e", "peak": 197e12, "gib": (16, 15.75), "hbm": 0.819e12, "link": 45e9,
        "efficiency": 0.7}  # fmt: skip
_V5P = {"name": "v5p", "peak": 459e12, "gib": (95, 95.74), "hbm": 2.765e12, "link": 90e9,
        "efficiency": 0.85}  # fmt: skip
_V6E = {"name": "v6e", "peak": 918e12, "gib": (32, 31.25), "hbm": 1.64e12, "link": 90e9,
        "efficiency": 0.68}  # fmt: skip

DEVICES = (
    _nvidia("A100", name="a100", peaks=(312e12, 19.5e12), memory_bytes=80 * _GIB,
            xla_bytes=85_100_068_864, hbm_bytes_per_s=2.039e12, fast_bytes_per_s=300e9,
            slow_bytes_per_s=25e9, efficiency=0.7),
    _nvidia("H100 PCIe", name="h100pcie", peaks=(756e12, 51e12), memory_bytes=80 * _GIB,
            xla_bytes=85_520_809_984, hbm_bytes_per_s=2.0e12, fast_bytes_per_s=64e9,
            slow_bytes_per_s=50e9, efficiency=0.66),
    _nvidia("H100", name="h100", peaks=(989e12, 67e12), memory_bytes=80 * _GIB,
            xla_bytes=84_942_979_072, hbm_bytes_per_s=3.352e12, **_HOPPER),
    _nvidia("H200", name="h200", peaks=(989e12, 67e12), memory_bytes=141 * _GIB,
            xla_bytes=151_397_597_184, hbm_bytes_per_s=4.8e12, **_HOPPER),
    _nvidia("B200", name="b200", peaks=(2250e12, 75e12), memory_bytes=180 * _GIB,
            xla_bytes=191_514_411_008, hbm_bytes_per_s=7.672e12, fast_bytes_per_s=900e9,
            slow_bytes_per_s=50e9, efficiency=0.6),
    _tpu("v4", name="v4", peak=275e12, gib=(32, 30.75), hbm=1.2e12, link=45e9, efficiency=0.7),
    _tpu("v5 lite", **_V5E),
    _tpu("v5e", **_V5E),
    _tpu("v5p", **_V5P),
    _tpu("v5", **_V5P),
    _tpu("v6 lite", **_V6E),
    _tpu("v6e", **_V6E),
    _tpu("TPU7x", name="tpu7x", peak=1153.5e12, gib=(96, 94.75), hbm=3.69e12, link=90e9,
         efficiency=0.6),
)  # fmt: skip


def give_gpu_memory() -> None:
    """Let XLA have GPU_MEMORY_FRACTION of a GPU, as plans assume, unless the user decided."""
    if not any(os.environ.get(name) for name in _FRACTION_VARIABLES):
        os.environ[_FRACTION_VARIABLES[0]] = str(GPU_MEMORY_FRACTION)


def find(device_kind: str) -> Device | None:
    """The entry of a device kind, or None when it is not known."""
    return next((d for d in DEVICES if device_kind.startswith(d.kind)), None)


def peak_flops(device_kind: str, dtype: ComputeDtype) -> tuple[float, str] | None:
    """Peak FLOP/s of one device in `dtype` and its source; None when unknown (never a guess)."""
    device = find(device_kind)
    peak = getattr(device, dtype) if device else None
    return None if peak is None else (peak, device.source)


def attention_preferences(platform: str) -> tuple[str, ...]:
    """Attention kernels to try on a platform, best first."""
    fused = {"gpu": ("cudnn",), "cuda": ("cudnn",), "tpu": ("splash",)}
    return (*fused.get(platform, ()), "blocked", "split", "xla")
