"""Devices that the plan knows: figures of their data sheets."""

import dataclasses
from dataclasses import dataclass

from jax_huginn.config.checks import require
from jax_huginn.model.flops import PEAK_BF16


@dataclass(frozen=True)
class Device:
    """One GPU. Bandwidths are one device's, one way, in 10^9 bytes/s."""

    kind: str
    """The vendor's name, as `jax.Device.device_kind` contains it."""
    peak_tflops: float
    """Dense bf16 peak, 10^12 FLOP/s."""
    memory_gb: float
    """What a program may fill, 10^9 bytes: 92 % of the card's memory, as training takes it."""
    memory_gbs: float
    nvlink_gbs: float
    """To the other devices of its host."""
    network_gbs: float
    """Its share of its host's network."""

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return self.peak_tflops * 1e12


def _device(kind: str, **figures: float) -> Device:
    return Device(kind, PEAK_BF16[kind] / 1e12, **figures)


# Vendors' data sheets (SXM and OAM boards). Network: one adapter of 400 Gbit/s (A100: 200) a GPU, as in DGX hosts.
# MI300X: seven links of 64 GB/s to the seven others.
DEVICES = {
    "h100": _device("H100", memory_gb=78, memory_gbs=3350, nvlink_gbs=450, network_gbs=50),
    "h200": _device("H200", memory_gb=130, memory_gbs=4800, nvlink_gbs=450, network_gbs=50),
    "b200": _device("B200", memory_gb=166, memory_gbs=8000, nvlink_gbs=900, network_gbs=50),
    "a100": _device("A100", memory_gb=78, memory_gbs=2039, nvlink_gbs=300, network_gbs=25),
    "mi300x": _device("MI300X", memory_gb=177, memory_gbs=5300, nvlink_gbs=448, network_gbs=50),
}


def make_device(name: str, **given: float | None) -> Device:
    """A known device, with the figures that are given in place of its own."""
    figures = {field: value for field, value in given.items() if value is not None}
    for field, value in figures.items():
        require(value > 0, f"--{field.replace('_', '-')} {value} must be positive")
    return dataclasses.replace(DEVICES[name], **figures)
