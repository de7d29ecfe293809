"""Devices that the plan knows: data-sheet figures, and which shares of them this project's step reached."""

import dataclasses
from dataclasses import dataclass

from jax_huginn.config.checks import require
from jax_huginn.model.flops import peak_flops

# Shares of the bf16 peak, of the kernels in a profile of the 3.8 B step on one H100 80GB, which its power limit then
# holds at 1.4 GHz (jax 0.11.2, docs/performance.md): matmuls, and cuDNN's causal attention forward and backward. The
# latter counts twice a forward's FLOPs, and heads 96 wide as the 128 to which it pads them.
MATMUL = 720 / 989.4
ATTENTION_FORWARD = 334 / 989.4
ATTENTION_BACKWARD = 308 / 989.4
HEAD_WIDTH = 128
# Share of the memory's bandwidth in all that is no matmul: fitted to one number, the 159 ms that the same step spends
# there, which the bytes of `seconds.py` explain at 2.6 TB/s of 3.35.
MEMORY = 0.77
# Share of a link's bandwidth that a large collective reaches. An assumption: nothing was run on several GPUs.
COLLECTIVE = 0.8


@dataclass(frozen=True)
class Device:
    """One GPU; bandwidths are a device's own, one way, in bytes of 10^9 a second."""

    kind: str
    """As `jax.Device.device_kind` begins; names its peak in `training.flops`."""
    memory_gb: float
    """What a program may fill: 92 % of the card's bytes, as train_jax.py takes them."""
    memory_gbs: float
    nvlink_gbs: float
    """To the other devices of its host."""
    network_gbs: float
    """Its share of its host's network."""

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak


# Vendors' data sheets (SXM boards). Network: an adapter of 400 or 200 Gbit/s a GPU, as DGX hosts have.
DEVICES = {
    "h100": Device("H100", memory_gb=78, memory_gbs=3350, nvlink_gbs=450, network_gbs=50),
    "h200": Device("H200", memory_gb=130, memory_gbs=4800, nvlink_gbs=450, network_gbs=50),
    "a100": Device("A100", memory_gb=78, memory_gbs=2039, nvlink_gbs=300, network_gbs=25),
}


def make_device(name: str, **given: float | None) -> Device:
    """A known device, with the figures that are given in place of its own."""
    for field, value in given.items():
        require(value is None or value > 0, f"--{field.replace('_', '-')} {value} must be positive")
    return dataclasses.replace(DEVICES[name], **{field: value for field, value in given.items() if value is not None})
