"""What is known of each kind of accelerator, as data. An unknown one has no peak: MFU is then null.

Peaks are dense (no sparsity), in FLOP/s, from the makers' data sheets; `source` says which.
"""

import dataclasses

from llamajax.config.schema import ComputeDtype


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device, found by the beginning of JAX's `device_kind`."""

    kind: str
    bfloat16: float
    float32: float | None
    memory_bytes: int
    source: str


_GIB = 2**30

DEVICES = (
    Device("NVIDIA A100", 312e12, 19.5e12, 80 * _GIB, "NVIDIA A100 data sheet, dense bf16"),
    Device("NVIDIA H100 PCIe", 756e12, 51e12, 80 * _GIB, "NVIDIA H100 PCIe data sheet, dense"),
    Device("NVIDIA H100", 989e12, 67e12, 80 * _GIB, "NVIDIA H100 SXM data sheet, dense bf16"),
    Device("NVIDIA H200", 989e12, 67e12, 141 * _GIB, "NVIDIA H200 SXM data sheet, dense bf16"),
    Device("NVIDIA B200", 2250e12, 75e12, 180 * _GIB, "NVIDIA HGX B200 data sheet, dense bf16"),
    Device("TPU v4", 275e12, None, 32 * _GIB, "Cloud TPU v4 documentation, per chip"),
    Device("TPU v5 lite", 197e12, None, 16 * _GIB, "Cloud TPU v5e documentation, per chip"),
    Device("TPU v5e", 197e12, None, 16 * _GIB, "Cloud TPU v5e documentation, per chip"),
    Device("TPU v5p", 459e12, None, 95 * _GIB, "Cloud TPU v5p documentation, per chip"),
    Device("TPU v5", 459e12, None, 95 * _GIB, "Cloud TPU v5p documentation, per chip"),
    Device("TPU v6 lite", 918e12, None, 32 * _GIB, "Cloud TPU v6e documentation, per chip"),
    Device("TPU v6e", 918e12, None, 32 * _GIB, "Cloud TPU v6e documentation, per chip"),
)


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
