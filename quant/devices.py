"""Devices as data: what a roofline and an energy estimate need to know of them.

The rates are the vendors' peak numbers without sparsity; energy per operation is board power divided by the
peak rate, energy per byte is that of the memory's kind. Both ends of a roofline are limits that kernels do
not reach, so every profile states how far off its latencies may be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from quant.reading import Node

RATES = ("float32", "bfloat16", "float8", "int8")


class DeviceError(ValueError):
    """A device profile that cannot be read."""


@dataclass(frozen=True)
class Device:
    """One device. `operations` are per second by type of arithmetic (a multiply-accumulate is two).

    `relative_error`: latencies of the roofline are meant to lie within a factor of 1 + relative_error of
    measured ones. `launch_ns` is what one kernel costs at least.
    """

    name: str
    summary: str
    source: str
    bytes_per_second: float
    operations: Mapping[str, float]
    launch_ns: float
    relative_error: float
    picojoules_per_byte: float
    picojoules_per_operation: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values; `read_device` reads them back."""
        return asdict(self)

    def nanoseconds(self, kind: str, operations: int, traffic: Fraction) -> Fraction:
        """The roofline: the longer of arithmetic and memory traffic (bytes), and the launch.

        >>> round(float(DEVICES["h100"].nanoseconds("bfloat16", 0, Fraction(3_350_000))))
        3000
        """
        arithmetic = Fraction(operations) / Fraction(_rate(self.operations, kind))
        memory = traffic / Fraction(self.bytes_per_second)
        return max(arithmetic, memory) * 10**9 + Fraction(self.launch_ns)

    def picojoules(self, kind: str, operations: int, traffic: Fraction) -> Fraction:
        """Energy of arithmetic and of memory traffic together."""
        arithmetic = operations * Fraction(_rate(self.picojoules_per_operation, kind))
        return arithmetic + traffic * Fraction(self.picojoules_per_byte)


def _rate(rates: Mapping[str, float], kind: str) -> float:
    """The rate of a type, or of the widest one that is given."""
    return rates.get(kind) or next(rates[name] for name in RATES if name in rates)


def read_device(value: str | Mapping[str, Any]) -> Device:
    """A user's profile, as JSON text or decoded. Raises DeviceError naming the place.

    >>> read_device(DEVICES["h100"].as_json()) == DEVICES["h100"]
    True
    """
    try:
        root = Node(json.loads(value) if isinstance(value, str) else value)
        fields = root.fields(*Device.__dataclass_fields__)
        return Device(
            name=fields["name"].text(),
            summary=fields["summary"].text(),
            source=fields["source"].text(),
            bytes_per_second=_positive(fields["bytes_per_second"]),
            operations=_rates(fields["operations"]),
            launch_ns=_not_negative(fields["launch_ns"]),
            relative_error=_not_negative(fields["relative_error"]),
            picojoules_per_byte=_not_negative(fields["picojoules_per_byte"]),
            picojoules_per_operation=_rates(fields["picojoules_per_operation"]),
        )
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"Device profile is not valid: {error}") from error


def _rates(node: Node) -> dict[str, float]:
    found = {name: _positive(member) for name, member in node.members()}
    if not found or set(found) - set(RATES):
        raise node.error(f"rates of some of {', '.join(RATES)}", "Correct the profile.")
    return found


def _positive(node: Node) -> float:
    value = node.number()
    if value <= 0:
        raise node.error("more than 0", "Correct the profile.")
    return value


def _not_negative(node: Node) -> float:
    value = node.number()
    if value < 0:
        raise node.error("0 or more", "Correct the profile.")
    return value


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="h100",
            summary="NVIDIA H100 SXM, 80 GB HBM3, 700 W",
            source="https://resources.nvidia.com/en-us-tensor-core",
            bytes_per_second=3.35e12,
            operations={"float32": 67e12, "bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12},
            launch_ns=2000,
            relative_error=1.0,
            picojoules_per_byte=32,
            picojoules_per_operation={"float32": 10.4, "bfloat16": 0.71, "float8": 0.35, "int8": 0.35},
        ),
        Device(
            name="h200",
            summary="NVIDIA H200 SXM, 141 GB HBM3e, 700 W",
            source="https://www.nvidia.com/en-us/data-center/h200/",
            bytes_per_second=4.8e12,
            operations={"float32": 67e12, "bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12},
            launch_ns=2000,
            relative_error=1.0,
            picojoules_per_byte=30,
            picojoules_per_operation={"float32": 10.4, "bfloat16": 0.71, "float8": 0.35, "int8": 0.35},
        ),
        Device(
            name="rtx4090",
            summary="NVIDIA GeForce RTX 4090, 24 GB GDDR6X, 450 W",
            source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            bytes_per_second=1.008e12,
            operations={"float32": 82.6e12, "bfloat16": 165.2e12, "float8": 330.3e12, "int8": 660.6e12},
            launch_ns=3000,
            relative_error=1.0,
            picojoules_per_byte=58,
            picojoules_per_operation={"float32": 5.4, "bfloat16": 2.7, "float8": 1.4, "int8": 0.68},
        ),
        Device(
            name="cpu-avx512",
            summary="One core of a server CPU with AVX-512 (two FMA units at 2.5 GHz)",
            source="Peak of the instruction set; memory bandwidth that one core can draw",
            bytes_per_second=1.2e10,
            operations={"float32": 160e9, "int8": 640e9},
            launch_ns=3000,
            relative_error=2.0,
            picojoules_per_byte=160,
            picojoules_per_operation={"float32": 60, "int8": 15},
        ),
    )
}
"""Profiles by name; a user's own goes with the request."""
