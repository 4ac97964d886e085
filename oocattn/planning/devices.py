"""The devices that a plan may be made for without having them: one record a device.

Rates that were measured say where. Others are estimates: the vendor's data sheet, times the share of it that the same
kernel has on an H100. To add a device: a record in `DEVICES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from oocattn import arguments
from oocattn.errors import ProblemError

DISK_RATE = 1e9
"""Bytes per second of a disk of which nothing is known."""

GIB = 1 << 30

_NOTES = "oocattn/kernels/cuda/NOTES.md"


PRECISE_SHARE = 2 / 3
"""Of hopper's rate that `hopper-precise` is taken to have: it makes three matrix products where that makes two."""


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """A device: its memory in bytes and the host's for it, and rates.

    `sheet` and `sheet_float32` are the data sheet's dense TFLOP/s on 16-bit numbers (added in float32) and on float32.
    `measured` are TFLOP/s of a kernel on large 16-bit tiles by head dimension (of a CPU on float32), and `measured_float32`
    on float32; `source` says where. `copy_rate` is between host and device, in bytes/s.
    """

    memory: int
    host_memory: int = 128 * GIB
    sheet: float = 0.0
    sheet_float32: float = 0.0
    copy_rate: float = 50e9
    hopper: bool = False
    measured: Mapping[int, float] = field(default_factory=dict)
    measured_float32: Mapping[int, float] = field(default_factory=dict)
    source: str = ""


_H100 = DeviceRecord(
    memory=80 * GIB,
    sheet=989.0,
    sheet_float32=67.0,
    hopper=True,
    measured={64: 500.0, 128: 625.0, 256: 756.0},  # after seconds of work, where power sets the clock; 256 is cuDNN's
    measured_float32={64: 13.0, 128: 20.0},
    source=f"{_NOTES} and docs/speed.md",
)

DEVICES = {
    "h100": _H100,
    "h200": DeviceRecord(
        memory=139 * GIB,
        sheet=989.0,
        sheet_float32=67.0,
        copy_rate=55e9,
        hopper=True,
        measured={64: 500.0, 128: 635.0, 256: 756.0},
        measured_float32={64: 13.0, 128: 20.0},
        source=f"{_NOTES}; of D = 256 and float32 on an H100",
    ),
    "cpu": DeviceRecord(  # a core; `sheet` is unused
        memory=8 * GIB,
        host_memory=8 * GIB,
        measured={32: 0.068, 64: 0.082, 128: 0.089},
        source="oocattn/kernels/cpu.py (Zen 4, 2 cores)",
    ),
    "h100-pcie": DeviceRecord(memory=80 * GIB, sheet=756.0, sheet_float32=51.0, hopper=True),
    "gh200": DeviceRecord(memory=96 * GIB, sheet=989.0, sheet_float32=67.0, copy_rate=300e9, hopper=True),
    "b200": DeviceRecord(memory=180 * GIB, sheet=2250.0, sheet_float32=75.0),
    "a100": DeviceRecord(memory=80 * GIB, sheet=312.0, sheet_float32=19.5, copy_rate=25e9),
    "a100-40gb": DeviceRecord(memory=40 * GIB, sheet=312.0, sheet_float32=19.5, copy_rate=25e9),
    "l40s": DeviceRecord(memory=48 * GIB, sheet=362.0, sheet_float32=91.6, copy_rate=25e9),
    "l4": DeviceRecord(memory=24 * GIB, sheet=121.0, sheet_float32=30.3, copy_rate=25e9),
    "rtx4090": DeviceRecord(memory=24 * GIB, sheet=165.2, sheet_float32=82.6, copy_rate=25e9),
    "rtx5090": DeviceRecord(memory=32 * GIB, sheet=209.5, sheet_float32=104.8),
}
"""By the name that `--device` takes."""


@dataclass(frozen=True)
class DeviceRate:
    """FLOP/s of a kernel on large tiles, the kernel's name, and in words where the figure comes from."""

    flops: float
    kernel: str
    words: str


def device_rate(name: str, dtype: str, head_dim: int, value_dim: int, precise: bool = False) -> DeviceRate:
    """The rate of a device's best kernel for a dtype and head dimensions, `precise` as in `oocattn.plan`."""
    record, widest = DEVICES[name], max(head_dim, value_dim)
    kernel = _kernel(name, record, dtype, widest, precise)
    products = kernel == "torch"  # plain matrix products, in float32
    known = record if record.measured else _H100
    rates, sheet, of_known = known.measured, record.sheet, known.sheet
    if products:
        rates, sheet, of_known = known.measured_float32, record.sheet_float32, known.sheet_float32
    padded = next((dim for dim in sorted(rates) if widest <= dim), max(rates))  # kernels work on as many columns
    rate = rates[padded] * min(1.0, (head_dim + value_dim) / 2 / padded)
    if kernel == "hopper-precise":
        rate *= PRECISE_SHARE
    if record.measured and kernel == "hopper-precise":
        words = f"estimate, {rate:.3g} TFLOP/s: {100 * PRECISE_SHARE:.0f}% of hopper's rate ({record.source})"
        return DeviceRate(rate * 1e12, kernel, words)
    if record.measured:
        return DeviceRate(rate * 1e12, kernel, f"measured, {rate:.3g} TFLOP/s ({record.source})")
    share = rate / of_known
    words = (
        f"estimate, {sheet * share:.3g} TFLOP/s: {100 * share:.0f}% of the data sheet's {sheet:g}, as measured on an H100"
    )
    return DeviceRate(sheet * share * 1e12, kernel, words)


def _kernel(name: str, record: DeviceRecord, dtype: str, widest: int, precise: bool) -> str:
    """The kernel that the registry would take; where libraries are missing, it takes a slower one."""
    if name == "cpu":
        return "cpu"
    if dtype == "float32" or widest > 256 or widest % 8:
        return "torch"
    if precise:
        return "hopper-precise" if record.hopper and widest <= 128 else "torch"
    if widest <= 128:
        return "hopper" if record.hopper else "cudnn"
    return "cudnn" if record.hopper else "flash"


def disk_rate(name: str, value: object) -> int:
    """Check an option that is in bytes per second: a number, or a text such as 6GB/s."""
    try:
        return arguments.size(name, value.strip().removesuffix("/s") if isinstance(value, str) else value)
    except ProblemError:
        raise arguments.refused(name, value, 'bytes per second, as a whole number or like "6GB/s"') from None
