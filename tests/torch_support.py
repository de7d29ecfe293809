"""Shared by the tests of the PyTorch twin: a small model of every kind, and weights at which nothing is neutral."""

from dataclasses import replace

import pytest
import torch

from torch_reference import MoEHuginnConfig, MoEHuginnModel

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

SEQUENCE = 64  # a short prompt hides RoPE mistakes

DENSE = MoEHuginnConfig(
    n_embd=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    padded_vocab_size=48,
    block_size=96,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=2,
    n_layers_in_coda=1,
    mean_recurrence=6,
    mean_backprop_depth=2,
)
INJECTION = replace(DENSE, num_experts=4, moe_k=2, moe_intermediate_size=12, z_weight=0.001)
RESIDUAL = replace(INJECTION, moe_residual=True)
CORE = replace(INJECTION, moe_placement="core")
KINDS = pytest.mark.parametrize(
    "config", [DENSE, INJECTION, RESIDUAL, CORE], ids=["dense", "injection", "residual", "core"]
)


def perturbed(config: MoEHuginnConfig, dtype: torch.dtype = torch.float64) -> MoEHuginnModel:
    """Weights at which nothing is neutral: at the init, swapped norms or a missing bias would change nothing."""
    model = MoEHuginnModel(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            elif "qk_bias" in name:
                weight.copy_(0.5 * noise)
            elif name.endswith((".proj.weight", ".w_down.weight")):
                weight.mul_(5)
            elif "router" in name:
                weight.mul_(10)
    return model


def batch(config: MoEHuginnConfig, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, config.padded_vocab_size, (rows, SEQUENCE), generator=torch.Generator().manual_seed(2))


def gradients(model: MoEHuginnModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
