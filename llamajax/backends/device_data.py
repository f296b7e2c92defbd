"""The table of accelerators: one entry a kind, with its figures and who says them.

Peaks are dense (no sparsity), in FLOP/s, from the makers' data sheets; `source` says which. A chip
of TPU v7x is two devices to JAX, an MI250X two, a Trainium1 two, a Trainium2 four: their figures
are those of one device. Entries whose `tested` is false never met a device of their kind here: the
name that JAX gives it is the maker's, as far as it could be read. Figures of the MI300X, of
Trainium (links too) and of the n150 were checked against the makers' pages on 2026-11-25 and 28,
the Max 1550's cores, clock and memory against what others cite of Intel's; other links and the
other untested entries are as remembered from data sheets. Gaudi has no entry: what JAX calls it is
not known here. What is published in contradictory ways (Tenstorrent's Blackhole) is left out: no
peak is better than a wrong one. What is looked up how: `devices`.
"""

import dataclasses
import os
from typing import Any

# Share of a GPU's memory that llamajax lets XLA have. JAX's own default is 0.75; the rest here is
# left to the CUDA context, to NCCL's buffers and to cuDNN's and cuBLAS's workspaces.
GPU_MEMORY_FRACTION = 0.92
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, found by the beginning of JAX's `device_kind`, or by its short `name`.

    bfloat16, float32: peak FLOP/s of matrix products. memory_bytes: what is on the data sheet;
    xla_bytes: what XLA sees of it, for programs and their arguments (a TPU's own compiler says so
    when it refuses a program; a GPU's is the size that CUDA reports, of which XLA gets a share).
    hbm_bytes_per_s: from the data sheet. fast_bytes_per_s, slow_bytes_per_s: what a device can send
    within its node or torus, and between nodes or slices, in one direction. efficiency: share of
    the peak that large matrix products of training reach; an assumption of predictions, never of an
    MFU. has_share: XLA gets a share of the memory only, as the environment says (NVIDIA's and AMD's
    GPUs). tested: llamajax was compiled for it or ran there.
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
    has_share: bool = False
    tested: bool = True

    @property
    def limit_bytes(self) -> int:
        """Memory that a program of llamajax may take of one device, as this environment is set."""
        if not self.has_share:
            return self.xla_bytes
        set_by_user = next((os.environ[v] for v in FRACTION_VARIABLES if os.environ.get(v)), None)
        return int(self.xla_bytes * float(set_by_user or GPU_MEMORY_FRACTION))


_GIB = 2**30
_NVLINK = "NVLink and one network adapter a GPU from the DGX data sheet"
_ICI = (
    "ICI from the Cloud TPU documentation: both directions of a ring over one link each; between "
    "slices the data-center network's share of a chip, from there as well"
)


def _nvidia(kind: str, *, name: str, peaks: tuple[float, float], **facts: float) -> Device:
    bfloat16, float32 = peaks
    source = f"NVIDIA {kind} data sheet, dense; {_NVLINK}"
    return Device(kind=f"NVIDIA {kind}", name=name, bfloat16=bfloat16, float32=float32,
                  source=source, has_share=True, **facts)  # fmt: skip


def _tpu(kind: str, *, name: str, peak: float, gib: tuple[float, float], hbm: float, link: float,
         network: float | None, efficiency: float) -> Device:  # fmt: skip
    """Return an entry. gib: memory, and what XLA sees of it.

    link: bytes/s of one ICI link in one direction. network: bytes/s between slices, None where that
    is not published.
    """
    return Device(
        kind=f"TPU {kind}" if kind.startswith("v") else kind,
        name=name,
        bfloat16=peak,
        float32=None,
        memory_bytes=int(gib[0] * _GIB),
        xla_bytes=int(gib[1] * _GIB),
        hbm_bytes_per_s=hbm,
        fast_bytes_per_s=2 * link,
        slow_bytes_per_s=network,
        efficiency=efficiency,
        source=f"Cloud TPU documentation of {name}, per device; {_ICI}",
    )


def _untested(kind: str, *, name: str, peaks: tuple[float, float | None], gib: float, hbm: float,
              links: tuple[float, float | None], efficiency: float, source: str,
              has_share: bool = False) -> Device:  # fmt: skip
    """Return an entry. peaks: bfloat16, float32. links: bytes/s in a node and between nodes."""
    return Device(
        kind=kind,
        name=name,
        bfloat16=peaks[0],
        float32=peaks[1],
        memory_bytes=int(gib * _GIB),
        xla_bytes=int(gib * _GIB),
        hbm_bytes_per_s=hbm,
        fast_bytes_per_s=links[0],
        slow_bytes_per_s=links[1],
        efficiency=efficiency,
        source=f"{source}; untested",
        has_share=has_share,
        tested=False,
    )


def _amd(kind: str, **facts: Any) -> Device:
    source = f"AMD Instinct {kind} data sheet, dense matrix peaks; one 400 Gbit/s adapter a GPU"
    return _untested(f"AMD Instinct {kind}", source=source, has_share=True, **facts)


# Efficiencies are set so that published training runs come out within a tenth or so (MaxText on
# H100, v5p, v6e; benchmarks/results says which); v4, v5e, A100, B200 and v7x are guesses by these.
_HOPPER = {"efficiency": 0.66, "fast_bytes_per_s": 450e9, "slow_bytes_per_s": 50e9}
_V5E = {"name": "v5e", "peak": 197e12, "gib": (16, 15.75), "hbm": 0.819e12, "link": 45e9,
        "network": 3.125e9, "efficiency": 0.7}  # fmt: skip
_V5P = {"name": "v5p", "peak": 459e12, "gib": (95, 95.74), "hbm": 2.765e12, "link": 90e9,
        "network": 6.25e9, "efficiency": 0.85}  # fmt: skip
_V6E = {"name": "v6e", "peak": 918e12, "gib": (32, 31.25), "hbm": 1.64e12, "link": 90e9,
        "network": 12.5e9, "efficiency": 0.68}  # fmt: skip

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
    _tpu("v4", name="v4", peak=275e12, gib=(32, 30.75), hbm=1.2e12, link=45e9, network=None,
         efficiency=0.7),
    _tpu("v5 lite", **_V5E),
    _tpu("v5e", **_V5E),
    _tpu("v5p", **_V5P),
    _tpu("v5", **_V5P),
    _tpu("v6 lite", **_V6E),
    _tpu("v6e", **_V6E),
    _tpu("TPU7x", name="tpu7x", peak=1153.5e12, gib=(96, 94.75), hbm=3.69e12, link=90e9,
         network=6.25e9, efficiency=0.6),
    # One device is one of the two dies (GCDs) of an MI250X.
    _amd("MI250X", name="mi250x", peaks=(191.5e12, 47.9e12), gib=64, hbm=1.638e12,
         links=(100e9, 25e9), efficiency=0.6),
    _amd("MI300X", name="mi300x", peaks=(1307.4e12, 163.4e12), gib=192, hbm=5.3e12,
         links=(448e9, 50e9), efficiency=0.5),
    _amd("MI325X", name="mi325x", peaks=(1307.4e12, 163.4e12), gib=256, hbm=6.0e12,
         links=(448e9, 50e9), efficiency=0.5),
    _amd("MI355X", name="mi355x", peaks=(2516.6e12, 157.3e12), gib=288, hbm=8.0e12,
         links=(538e9, 50e9), efficiency=0.5),
    # One device is one of the two stacks, as the oneAPI runtime shows them by default.
    _untested("Intel(R) Data Center GPU Max 1550", name="max1550", peaks=(419e12, 26.2e12), gib=64,
              hbm=1.638e12, links=(185e9, 25e9), efficiency=0.5,
              source="Intel Data Center GPU Max 1550, 128 Xe cores at 1.6 GHz, halved: one stack"),
    # One device is one NeuronCore of two, or one logical core of four.
    _untested("NC_v2", name="trn1", peaks=(95e12, 23.75e12), gib=16, hbm=410e9,
              links=(192e9, 12.5e9), efficiency=0.5,
              source="AWS Neuron documentation, Trainium architecture, halved: one NeuronCore-v2"),
    _untested("NC_v3", name="trn2", peaks=(166.75e12, 45.25e12), gib=24, hbm=725e9,
              links=(320e9, 6.25e9), efficiency=0.5,
              source="AWS Neuron documentation, Trainium2 architecture, a quarter: a logical "
              "core of two cores"),
    _untested("Wormhole", name="n150", peaks=(74e12, None), gib=12, hbm=288e9,
              links=(25e9, None), efficiency=0.4,
              source="Tenstorrent Wormhole specifications, n150s, FP16; "
              "a link of 200 Gbit/s assumed"),
)  # fmt: skip
