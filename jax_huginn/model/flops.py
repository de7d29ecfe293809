"""Floating-point operations of the model and peak rates of devices, for TFLOP/s, MFU and the plan.

Only useful work counts: a matmul of P parameters costs 2 P per token forward and 4 P backward, attention half of its
square, and neither rematerialisation nor the empty places of the experts' grid count. The adapter multiplies the
embedding once and the state in every recurrence.
"""

from typing import NamedTuple

from jax_huginn.config.schema import Config

# Dense bf16 peak in FLOP/s from the vendors' data sheets, without sparsity; the first match in a device's name counts.
# An unknown device has no MFU rather than a guessed one.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,  # one of its two dies, which is what a process sees as a device
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of a device by `jax.Device.device_kind`, FLOP/s; None if unknown."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_kind), None)


class Part(NamedTuple):
    """One matmul of a block, or its attention, for one token."""

    name: str
    """The name of its result in `model.remat`: matmul, gate_up or attention."""
    flops: float
    """FLOPs of the forward pass."""
    result: float
    """Elements that the backward pass may keep."""


def block_parts(config: Config, length: int, moe: bool = False, capacity: float = 1) -> list[Part]:
    """The parts of a sandwich block at a sequence length, with the MoE in place of its MLP if asked; `capacity` is
    that of `moe_parts`."""
    model = config.model
    width, heads, kv_heads = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = [
        Part("matmul", 2 * width * (heads + 2 * kv_heads), heads + 2 * kv_heads),
        Part("attention", 2 * length * heads, heads),
        Part("matmul", 2 * heads * width, width),
    ]
    mlp = [
        Part("gate_up", 2 * width * 2 * model.mlp_width, 2 * model.mlp_width),
        Part("matmul", 2 * model.mlp_width * width, width),
    ]
    return attention + (moe_parts(config, capacity) if moe else mlp)


def moe_parts(config: Config, capacity: float = 1) -> list[Part]:
    """Router, shared expert and active routed experts, whose results take `capacity` places per assignment."""
    width, moe = config.model.width, config.moe
    experts = 1 + moe.active
    return [
        Part("matmul", 2 * width * moe.experts, 0),
        Part("gate_up", 2 * width * 2 * moe.width * experts, 2 * moe.width * (1 + moe.active * capacity)),
        Part("matmul", 2 * moe.width * width * experts, width),
    ]


def core_has_moe(config: Config) -> bool:
    return config.moe.experts > 0 and config.moe.placement == "core"


def core_parts(config: Config, length: int) -> list[Part]:
    """One recurrence: the adapter's half for the state, then the core's blocks."""
    width = config.model.width
    block = block_parts(config, length, core_has_moe(config))
    return [Part("matmul", 2 * width**2, width), *block * config.model.core_layers]


def outer_parts(config: Config, length: int) -> list[Part]:
    """What is outside the recurrence under `model.remat`: prelude, MoE at the injection, coda."""
    model = config.model
    moe = moe_parts(config) if config.moe.experts and not core_has_moe(config) else []
    return block_parts(config, length) * (model.prelude_layers + model.coda_layers) + moe


def forward_flops(config: Config, length: int) -> tuple[float, float]:
    """Forward FLOPs per token of (everything outside the recurrence, one recurrence)."""
    model = config.model
    head, adapter = 2 * model.vocab_size * model.width, 2 * model.width**2  # the adapter's half for the embedding
    outside, recurrence = (sum(part.flops for part in parts(config, length)) for parts in (outer_parts, core_parts))
    return float(outside + head + adapter), float(recurrence)


def training_flops(config: Config, n: float, k: float) -> float:
    """FLOPs per token of forward and backward at n recurrences without and k with gradient."""
    outside, recurrence = forward_flops(config, config.train.sequence_length)
    return 3 * outside + (n + 3 * k) * recurrence
