"""Floating-point operations of the model and the peak rates of devices, for TFLOP/s and MFU.

A matmul of P parameters costs 2 P per token forward and 4 P backward; causal attention counts half its square;
what rematerialisation computes again does not count.
"""

from jax_huginn.config.schema import Config

# Dense bf16 peak in FLOP/s from the vendors' data sheets, without sparsity; the first match of a device's name counts.
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


def forward_flops(config: Config, sequence_length: int) -> tuple[float, float]:
    """Forward FLOPs per token of (everything outside the recurrence, one recurrence)."""
    model, moe = config.model, config.moe
    expert = 3 * model.width * moe.width
    moe_params = (moe.active + 1) * expert + model.width * moe.experts if moe.experts else 0
    heads_width = model.heads * model.head_dim
    attention = model.width * (heads_width + 2 * model.kv_heads * model.head_dim) + heads_width * model.width
    scores = 2 * sequence_length * heads_width
    mlp = 3 * model.width * model.mlp_width
    core_moe = moe.experts > 0 and moe.placement == "core"
    block = 2 * (attention + mlp) + scores
    core_block = 2 * (attention + (moe_params if core_moe else mlp)) + scores
    outside = (model.prelude_layers + model.coda_layers) * block + 2 * model.vocab_size * model.width
    if not core_moe:
        outside += 2 * moe_params
    return float(outside), float(model.core_layers * core_block + 2 * 2 * model.width**2)


def training_flops(config: Config, n: float, k: float) -> float:
    """FLOPs per token of forward and backward at n recurrences without and k with gradient."""
    outside, recurrence = forward_flops(config, config.train.sequence_length)
    return 3 * outside + (n + 3 * k) * recurrence
