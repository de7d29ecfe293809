"""The dense parts: norm, rotary positions, attention and gated MLP. The letters of shapes are those of `model.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEHuginnConfig


@dataclass
class Context:
    """Where the tokens are and what they see, for a caller that pads or caches. Default: 0 .. S-1, causal."""

    position_BS: Tensor
    visible_BSL: Tensor  # which of the L keys each token attends to
    extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # an attention's new (keys, values), (B,H,S,K) -> all L


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Normalises in at least float32 and scales after the cast back."""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        x32_BSD = at_least_float32(x_BSD)
        normal_BSD = x32_BSD * torch.rsqrt(x32_BSD.square().mean(dim=-1, keepdim=True) + self.eps)
        return normal_BSD.to(x_BSD.dtype) * self.weight


@lru_cache(maxsize=8)
def rope_tables(S: int, K: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/K), each (S, 1, K/2) in float64."""
    frequency = base ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)
    angle = torch.outer(torch.arange(S, dtype=torch.float64), frequency)[:, None, :]
    return angle.cos().to(device), angle.sin().to(device)


def apply_rope(x_BSHK: Tensor, base: float, position_BS: Tensor | None = None) -> Tensor:
    """Rotates the interleaved pairs (2i, 2i + 1) of every head by its position's angles; 0 .. S-1 if not given."""
    x32_BSHK = at_least_float32(x_BSHK)
    length = x_BSHK.shape[1] if position_BS is None else int(position_BS.max()) + 1
    cos, sin = rope_tables(length, x_BSHK.shape[3], base, x_BSHK.device)
    if position_BS is not None:
        cos, sin = cos[position_BS], sin[position_BS]
    cos, sin = cos.to(x32_BSHK.dtype), sin.to(x32_BSHK.dtype)
    even, odd = x32_BSHK[..., 0::2], x32_BSHK[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x_BSHK.dtype)


class Attention(nn.Module):
    """Causal self-attention with a learned bias on queries and keys, and grouped key/value heads."""

    def __init__(self, config: MoEHuginnConfig):
        super().__init__()
        D, H, G, K = (config.n_embd, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.heads = (H, G, K)
        self.rope_base = config.rope_base
        self.Wqkv = nn.Linear(D, (H + 2 * G) * K, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, H, K))
        self.proj = nn.Linear(H * K, D, bias=False)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        H, G, K = self.heads
        at = () if context is None else (context.position_BS,)
        q_BSHK, k_BSGK, v_BSGK = self.Wqkv(x_BSD).unflatten(-1, (H + 2 * G, K)).split((H, G, G), dim=2)
        k_BSHK = k_BSGK.repeat_interleave(H // G, dim=2)
        v_BSHK = v_BSGK.repeat_interleave(H // G, dim=2)
        q_BSHK = apply_rope(q_BSHK + self.qk_bias[0], self.rope_base, *at)
        k_BSHK = apply_rope(k_BSHK + self.qk_bias[1], self.rope_base, *at)
        q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
        mask = None
        if context is not None:
            k_BHSK, v_BHSK = context.extend(k_BHSK, v_BHSK)
            mask = context.visible_BSL[:, None]
        y_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, mask, is_causal=mask is None)  # scale 1/sqrt(K)
        return self.proj(y_BHSK.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """proj(silu(gate) * up), with gate and up computed by one matrix, in this order."""

    def __init__(self, config: MoEHuginnConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.fc(x_BSD).chunk(2, dim=-1)
        return self.proj(F.silu(gate_BSF) * up_BSF)
