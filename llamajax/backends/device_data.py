"""The table of accelerators: one entry a kind, with its figures and who says them.

Peaks are dense (no sparsity), in FLOP/s, from the makers' data sheets; `source` says which. A chip
of TPU v7x is two devices to JAX, an MI250X two, a Trainium1 two, a Trainium2 four: their figures
are those of one device. Entries whose `tested` is false never met a device of their kind here: the
name that JAX gives it is the maker's, as far as it could be read. Figures of the MI300X, of
Trainium (links too) and of the n150 were checked against the makers' pages on 2026-11-25 and 28,
the Max 1550's cores, clock and memory against what others cite of Intel's; other links and the
other untested entries are as remembered from data sheets. Gaudi has no entry: what JAX calls it is
not known here. What is published in contradictory ways (Tenstorrent's Blackhole) is left out: no
peak is better than a wrong one. `devices` looks them up.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

# Share of a GPU's memory that llamajax lets XLA have. JAX's own default is 0.75; the rest here is
# left to the CUDA context, to NCCL's buffers and to cuDNN's and cuBLAS's workspaces.
GPU_MEMORY_FRACTION = 0.92
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, found by the beginning of JAX's `device_kind`, or by its short `name`.

    bfloat16, float32: peak FLOP/s of matrix products; float8: of products of e4m3 and e5m2, None
    where a device has none or it is not known. memory_bytes: what is on the data sheet;
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
    float8: float | None = None

    def peak(self, dtype: str) -> float | None:
        """Return the peak FLOP/s of products in a `train.dtype`; None where it is unknown.

        Where a device does not multiply in 8 bits, float8 runs in bfloat16.
        """
        return (self.float8 or self.bfloat16) if dtype == "float8" else getattr(self, dtype)

    def product_rate(self, dtype: str) -> float | None:
        """Return the FLOP/s of large matrix products in a dtype; None where its peak is unknown."""
        peak = self.peak(dtype)
        share = _FLOAT8_SHARE if dtype == "float8" and self.float8 else 1.0
        return None if peak is None else peak * self.efficiency * share

    @property
    def limit_bytes(self) -> int:
        """Memory that a program of llamajax may take of one device, as this environment is set."""
        if not self.has_share:
            return self.xla_bytes
        set_by_user = next((os.environ[v] for v in FRACTION_VARIABLES if os.environ.get(v)), None)
        return int(self.xla_bytes * float(set_by_user or GPU_MEMORY_FRACTION))


_GIB = 2**30
# Of `efficiency`, in products of 8 bits: fitted to 16,934 tokens/s a device of Llama2-7B in 8 bits
# on 8 H100 (NeMo's published figure).
_FLOAT8_SHARE = 0.8

# Columns: kind, name; peak FLOP/s in bfloat16 and float32; memory in GiB; what XLA sees of it, in
# bytes, None: all; bytes/s of HBM, within a node or torus, between nodes or slices; efficiency.
# Efficiencies are set so that published training runs come out within a tenth or so (MaxText on
# H100, v5p, v6e; benchmarks/results says which); v4, v5e, A100, B200 and v7x are guesses by these.
# fmt: off
_NVIDIA = (
    ("A100",      "a100",     312e12,  19.5e12, 80,  85_100_068_864,  2.039e12, 300e9, 25e9, 0.7),
    ("H100 PCIe", "h100pcie", 756e12,  51e12,   80,  85_520_809_984,  2.0e12,   64e9,  50e9, 0.66),
    ("H100",      "h100",     989e12,  67e12,   80,  84_942_979_072,  3.352e12, 450e9, 50e9, 0.66),
    ("H200",      "h200",     989e12,  67e12,   141, 151_397_597_184, 4.8e12,   450e9, 50e9, 0.66),
    ("B200",      "b200",     2250e12, 75e12,   180, 191_514_411_008, 7.672e12, 900e9, 50e9, 0.6),
)
# Within a torus: both directions of a ring over one link of ICI each.
_TPU = (
    ("TPU v4",      "v4",    275e12,    None, 32, 30.75 * _GIB, 1.2e12,   90e9,  None,    0.7),
    ("TPU v5 lite", "v5e",   197e12,    None, 16, 15.75 * _GIB, 0.819e12, 90e9,  3.125e9, 0.7),
    ("TPU v5e",     "v5e",   197e12,    None, 16, 15.75 * _GIB, 0.819e12, 90e9,  3.125e9, 0.7),
    ("TPU v5p",     "v5p",   459e12,    None, 95, 95.74 * _GIB, 2.765e12, 180e9, 6.25e9,  0.85),
    ("TPU v5",      "v5p",   459e12,    None, 95, 95.74 * _GIB, 2.765e12, 180e9, 6.25e9,  0.85),
    ("TPU v6 lite", "v6e",   918e12,    None, 32, 31.25 * _GIB, 1.64e12,  180e9, 12.5e9,  0.68),
    ("TPU v6e",     "v6e",   918e12,    None, 32, 31.25 * _GIB, 1.64e12,  180e9, 12.5e9,  0.68),
    ("TPU7x",       "tpu7x", 1153.5e12, None, 96, 94.75 * _GIB, 3.69e12,  180e9, 6.25e9,  0.6),
)
# One device is one of the two dies (GCDs) of an MI250X.
_AMD = (
    ("MI250X", "mi250x", 191.5e12,  47.9e12,  64,  None, 1.638e12, 100e9, 25e9, 0.6),
    ("MI300X", "mi300x", 1307.4e12, 163.4e12, 192, None, 5.3e12,   448e9, 50e9, 0.5),
    ("MI325X", "mi325x", 1307.4e12, 163.4e12, 256, None, 6.0e12,   448e9, 50e9, 0.5),
    ("MI355X", "mi355x", 2516.6e12, 157.3e12, 288, None, 8.0e12,   538e9, 50e9, 0.5),
)
# One device is one of the two stacks, as the oneAPI runtime shows them by default.
_INTEL = (
    ("Intel(R) Data Center GPU Max 1550", "max1550", 419e12, 26.2e12, 64, None, 1.638e12, 185e9,
     25e9, 0.5),
)
# One device is one NeuronCore of two, or one logical core of four.
_TRN1 = (("NC_v2", "trn1", 95e12, 23.75e12, 16, None, 410e9, 192e9, 12.5e9, 0.5),)
_TRN2 = (("NC_v3", "trn2", 166.75e12, 45.25e12, 24, None, 725e9, 320e9, 6.25e9, 0.5),)
_WORMHOLE = (("Wormhole", "n150", 74e12, None, 12, None, 288e9, 25e9, None, 0.4),)
# fmt: on
# Peak FLOP/s of 8-bit products, by name: the same data sheets, dense. The MI300X and MI325X have
# them for the formats "fnuz" alone, which llamajax does not use; TPUs before v7x have none.
_FLOAT8 = {
    "h100pcie": 1513e12,
    "h100": 1979e12,
    "h200": 1979e12,
    "b200": 4500e12,
    "tpu7x": 2307e12,
    "mi355x": 5033e12,
}  # fmt: skip


def _devices(
    rows: Sequence[tuple], source: str, *, prefix: str = "", has_share: bool = False,
    tested: bool = False,
) -> Iterator[Device]:  # fmt: skip
    """Yield the entries of a maker. source: with {name} and {kind} where it differs by device."""
    for kind, name, bfloat16, float32, gib, xla_bytes, hbm, fast, slow, efficiency in rows:
        yield Device(
            kind=prefix + kind,
            name=name,
            bfloat16=bfloat16,
            float32=float32,
            memory_bytes=gib * _GIB,
            xla_bytes=int(xla_bytes or gib * _GIB),
            hbm_bytes_per_s=hbm,
            fast_bytes_per_s=fast,
            slow_bytes_per_s=slow,
            efficiency=efficiency,
            source=source.format(name=name, kind=prefix + kind) + ("" if tested else "; untested"),
            has_share=has_share,
            tested=tested,
            float8=_FLOAT8.get(name),
        )


DEVICES = (
    *_devices(_NVIDIA, "{kind} data sheet, dense; NVLink and one network adapter a GPU from the "
              "DGX data sheet", prefix="NVIDIA ", has_share=True, tested=True),
    *_devices(_TPU, "Cloud TPU documentation of {name}, per device; ICI from the Cloud TPU "
              "documentation: both directions of a ring over one link each; between slices the "
              "data-center network's share of a chip, from there as well", tested=True),
    *_devices(_AMD, "{kind} data sheet, dense matrix peaks; one 400 Gbit/s adapter a GPU",
              prefix="AMD Instinct ", has_share=True),
    *_devices(_INTEL, "Intel Data Center GPU Max 1550, 128 Xe cores at 1.6 GHz, halved: one stack"),
    *_devices(_TRN1, "AWS Neuron documentation, Trainium architecture, halved: one NeuronCore-v2"),
    *_devices(_TRN2, "AWS Neuron documentation, Trainium2 architecture, a quarter: a logical core "
              "of two cores"),
    *_devices(_WORMHOLE, "Tenstorrent Wormhole specifications, n150s, FP16; a link of 200 Gbit/s "
              "assumed"),
)  # fmt: skip
