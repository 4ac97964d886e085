"""The devices that a plan may be made for without having them: one record a device.

Rates that were measured say where. Others are estimates: the vendor's data sheet, times the share of it that the same kernel
has on an H200, or an H100. To add a device: a record in `DEVICES`.
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

FLOAT32 = "hopper, float32"  # a kind of calls beside those that have the name of their kernel


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """A device: its memory in bytes and the host's for it, and rates.

    `sheet` and `sheet_float32` are the data sheet's dense TFLOP/s on 16-bit numbers (added in float32) and on float32.
    `measured` are TFLOP/s on large tiles, by head dimension, of each kind of calls: a kernel's name, or `FLOAT32`; `source`
    says where. `copy_rate` is between host and device, in bytes/s.
    """

    memory: int
    host_memory: int = 128 * GIB
    sheet: float = 0.0
    sheet_float32: float = 0.0
    copy_rate: float = 50e9
    hopper: bool = False
    measured: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    source: str = ""


DEVICES = {
    "h100": DeviceRecord(
        memory=80 * GIB,
        sheet=989.0,
        sheet_float32=67.0,
        hopper=True,
        measured={  # after seconds of work, where power sets the clock
            "hopper": {64: 500.0, 128: 625.0, 256: 756.0},
            "cudnn": {64: 415.0, 128: 584.0, 256: 756.0},
            "torch": {64: 13.0, 128: 20.0},
        },
        source=f"{_NOTES} and docs/speed.md, of an older hopper, and of cuDNN at D = 256",
    ),
    "h200": DeviceRecord(
        memory=139 * GIB,
        sheet=989.0,
        sheet_float32=67.0,
        copy_rate=55e9,
        hopper=True,
        measured={  # calls of 3 ms and more
            "hopper": {64: 550.0, 128: 700.0, 256: 780.0},
            FLOAT32: {64: 235.0, 128: 250.0},
            "hopper-precise": {64: 370.0, 128: 440.0},
        },
        source=_NOTES,
    ),
    "cpu": DeviceRecord(  # a core; `sheet` is unused
        memory=8 * GIB,
        host_memory=8 * GIB,
        measured={"cpu": {32: 0.068, 64: 0.082, 128: 0.089}},
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
    kind = FLOAT32 if kernel == "hopper" and dtype == "float32" else "cudnn" if kernel == "flash" else kernel
    where = next(each for each in (name, "h200", "h100") if kind in DEVICES[each].measured)
    rates = DEVICES[where].measured[kind]
    padded = next((dim for dim in sorted(rates) if widest <= dim), max(rates))  # kernels work on as many columns
    rate = rates[padded] * min(1.0, (head_dim + value_dim) / 2 / padded)
    if where == name:
        return DeviceRate(rate * 1e12, kernel, f"measured, {rate:.3g} TFLOP/s ({record.source})")
    sheet, of_known = (each.sheet_float32 if kernel == "torch" else each.sheet for each in (record, DEVICES[where]))
    share = rate / of_known
    words = f"estimate, {sheet * share:.3g} TFLOP/s: {100 * share:.0f}% of the data sheet's {sheet:g}"
    return DeviceRate(sheet * share * 1e12, kernel, f"{words}, as measured on an {where.upper()}")


def _kernel(name: str, record: DeviceRecord, dtype: str, widest: int, precise: bool) -> str:
    """The kernel that the registry would take; where libraries are missing, it takes a slower one."""
    if name == "cpu":
        return "cpu"
    half, odd = dtype != "float32", widest % 8 > 0
    if record.hopper and not odd and widest <= (256 if half and not precise else 128):
        return "hopper-precise" if half and precise else "hopper"
    if not half or precise or odd or widest > 256:
        return "torch"
    return "cudnn" if widest <= 128 else "flash"


def disk_rate(name: str, value: object) -> int:
    """Check an option that is in bytes per second: a number, or a text such as 6GB/s."""
    try:
        return arguments.size(name, value.strip().removesuffix("/s") if isinstance(value, str) else value)
    except ProblemError:
        raise arguments.refused(name, value, 'bytes per second, as a whole number or like "6GB/s"') from None
