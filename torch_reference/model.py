"""MoE-Huginn in plain PyTorch: the model to read, and the one that the JAX model is held to.

A depth-recurrent language model (Geiping et al. 2025, arXiv 2502.05171): a prelude embeds the tokens, one core
is applied repeatedly to a latent state, and a coda reads out the result. A shared-expert Mixture of Experts
transforms the embedding that every recurrence receives, or replaces the MLPs of the core. The code is written to be
read, not for speed: experts run in a loop, the cache is the caller's, and the model does not sample its own depth.

The name of an array ends in its shape, one letter per axis:

    B  batch                      S  sequence                   D  model width
    V  vocabulary                 F  MLP hidden width           K  head width
    H  query heads                G  key and value heads        T  tokens, B times S
    E  routed experts             A  experts per token          M  expert hidden width
    L  positions of a cache

"At least float32" is `promote_types(dtype, float32)`, so that the whole model also runs in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEHuginnConfig
from .initial_state import initial_state as draw_initial_state

IGNORE = -100


@dataclass
class RoutingStatistics:
    """Routing statistics. Over several calls (placement "core") counts are summed and the rest is averaged."""

    counts_E: Tensor  # assignments that each expert received
    first_choice_E: Tensor  # tokens that each expert was the first choice of
    probability_E: Tensor  # mean over tokens of the softmax over all experts
    entropy: Tensor  # mean over tokens of that softmax's entropy, in nats
    z_loss: Tensor  # mean squared logsumexp of the logits: the z-loss before its weight
    balance_loss: Tensor  # E * sum_i f_i P_i, 1 when balanced: the balance loss before its weight


@dataclass
class MoEHuginnOutput:
    """Results of one forward pass; `loss` and `log_ppl` are None without labels, `moe` for a dense model."""

    logits: Tensor  # (B, S, V), at least float32
    latents: Tensor  # rms_norm_f(s_R), (B, S, D)
    moe: RoutingStatistics | None
    recurrent_residual: Tensor  # mean over positions of ||s_R - s_{R-1}||, before the final norm
    state_norm: Tensor  # mean over positions of ||s_R||, before the final norm
    loss: Tensor | None = None  # log_ppl plus the weighted auxiliary losses
    log_ppl: Tensor | None = None  # mean cross-entropy over the labels that are not ignored, in nats


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


class Expert(nn.Module):
    """One SwiGLU expert."""

    def __init__(self, D: int, M: int):
        super().__init__()
        self.w_gate = nn.Linear(D, M, bias=False)
        self.w_up = nn.Linear(D, M, bias=False)
        self.w_down = nn.Linear(M, D, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x_TD)) * self.w_up(x_TD))


class MoE(nn.Module):
    """shared(x) + sum over the chosen experts of p_a expert_a(x); no token is ever dropped."""

    def __init__(self, config: MoEHuginnConfig):
        super().__init__()
        D, E, M = config.n_embd, config.num_experts, config.moe_intermediate_size
        self.active = config.moe_k
        self.router = nn.Linear(D, E, bias=False)
        self.shared_expert = Expert(D, M)
        self.specialized_experts = nn.ModuleList(Expert(D, M) for _ in range(E))

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStatistics]:
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = at_least_float32(x_TD) @ at_least_float32(self.router.weight).T
        # A stable sort gives ties to the lower index, as JAX's top_k does; torch.topk promises nothing.
        order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
        chosen_TA = order_TE[:, : self.active]
        weight_TA = logits_TE.gather(1, chosen_TA).softmax(dim=-1).to(x_TD.dtype)

        y_TD = self.shared_expert(x_TD)
        for i, expert in enumerate(self.specialized_experts):
            token, slot = (chosen_TA == i).nonzero(as_tuple=True)
            y_TD = y_TD.index_add(0, token, expert(x_TD[token]) * weight_TA[token, slot, None])
        return y_TD.view_as(x_BSD), routing_statistics(logits_TE, chosen_TA)


def routing_statistics(logits_TE: Tensor, chosen_TA: Tensor) -> RoutingStatistics:
    """Statistics of one call; gradients flow through the probabilities and the logits, not through the counts."""
    E = logits_TE.shape[1]
    log_p_TE = logits_TE.log_softmax(dim=-1)
    probability_E = log_p_TE.exp().mean(dim=0)
    counts_E = torch.bincount(chosen_TA.flatten(), minlength=E)
    return RoutingStatistics(
        counts_E=counts_E,
        first_choice_E=torch.bincount(chosen_TA[:, 0], minlength=E),
        probability_E=probability_E,
        entropy=-(log_p_TE.exp() * log_p_TE).sum(dim=-1).mean(),
        z_loss=logits_TE.logsumexp(dim=-1).square().mean(),
        balance_loss=E * (counts_E.to(probability_E) / chosen_TA.numel() * probability_E).sum(),
    )


def summarise(calls: list[RoutingStatistics], E: int, zero: Tensor) -> RoutingStatistics:
    """Counts summed and the rest averaged over the calls that count; zeros when there was none."""
    if not calls:
        zero_E = zero.expand(E)
        return RoutingStatistics(zero_E.long(), zero_E.long(), zero_E, zero, zero, zero)
    stacked = {f.name: torch.stack([getattr(call, f.name) for call in calls]) for f in fields(RoutingStatistics)}
    summed = ("counts_E", "first_choice_E")
    return RoutingStatistics(**{name: x.sum(0) if name in summed else x.mean(0) for name, x in stacked.items()})


class SandwichBlock(nn.Module):
    """x = norm_2(attn(norm_1(x)) + x); x = norm_4(mlp(norm_3(x)) + x), the MLP being a MoE if `moe`."""

    def __init__(self, config: MoEHuginnConfig, moe: bool = False):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps)
        if moe:
            self.moe = MoE(config)
        else:
            self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps)
        self.has_moe = moe

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> tuple[Tensor, RoutingStatistics | None]:
        x_BSD = self.norm_2(self.attn(self.norm_1(x_BSD), context) + x_BSD)
        z_BSD, routing = self.moe(self.norm_3(x_BSD)) if self.has_moe else (self.mlp(self.norm_3(x_BSD)), None)
        return self.norm_4(z_BSD + x_BSD), routing


class MoEHuginnModel(nn.Module):
    """The language model; `config` gives its shape and `seed` its initial weights (None leaves PyTorch's own)."""

    def __init__(self, config: MoEHuginnConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        D, in_core = (config.n_embd, config.num_experts > 0 and config.moe_placement == "core")
        self.moe_at_injection = config.num_experts > 0 and not in_core
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(config.padded_vocab_size, D)
        for name, layers in (
            ("prelude", config.n_layers_in_prelude),
            ("core_block", config.n_layers_in_recurrent_block),
            ("coda", config.n_layers_in_coda),
        ):
            self.transformer[name] = nn.ModuleList(
                SandwichBlock(config, moe=in_core and name == "core_block") for _ in range(layers)
            )
        if self.moe_at_injection:
            self.transformer["moe"] = MoE(config)
            self.transformer["moe_norm"] = RMSNorm(D, config.norm_eps)
        self.transformer["adapter"] = nn.Linear(2 * D, D, bias=False)
        self.transformer["ln_f"] = RMSNorm(D, config.norm_eps)
        if seed is not None:
            self.reset_parameters(seed)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Takase init: truncated normals of std sqrt(2/(5D)), over sqrt(2L) for the last matrix of a residual branch;
        the router is normal with std 0.02. A MoE at the injection is a branch only with `moe_residual`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        std = math.sqrt(2 / (5 * self.config.n_embd))
        moe_is_branch = self.config.moe_placement == "core" or self.config.moe_residual
        outputs = (".proj.weight", ".w_down.weight") if moe_is_branch else (".proj.weight",)
        for name, weight in self.named_parameters():
            if "norm_" in name or name.endswith(("moe_norm.weight", "ln_f.weight")):
                weight.fill_(1.0)
            elif name.endswith("qk_bias"):
                weight.zero_()
            elif name.endswith("router.weight"):
                weight.normal_(std=0.02, generator=generator)
            else:
                std_w = std / math.sqrt(2 * self.config.effective_depth) if name.endswith(outputs) else std
                nn.init.trunc_normal_(weight, std=std_w, a=-3 * std_w, b=3 * std_w, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        num_steps: tuple[int, int] | None = None,
        initial_state: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MoEHuginnOutput:
        """Logits, and with labels the loss, after n recurrences without gradient and k with.

        tokens (B, S) integers; num_steps (n, k), by default the mean recurrence with the mean backpropagation depth;
        initial_state (B, S, D) or None for the recipe of initial_state.py with seed 0, in training too;
        labels (B, S), the *next* tokens, IGNORE where there is none.
        """
        output_BSD, out = self.hidden(tokens, num_steps, initial_state)
        out.logits = self.unembed(output_BSD)
        if labels is not None:
            labels_T = labels.flatten().long()
            out.log_ppl = F.cross_entropy(out.logits.flatten(0, 1), labels_T, ignore_index=IGNORE)
            out.loss = out.log_ppl
            if out.moe is not None:
                out.loss = (
                    out.loss + self.config.balance_weight * out.moe.balance_loss + self.config.z_weight * out.moe.z_loss
                )
        return out

    def unembed(self, output_BSD: Tensor) -> Tensor:
        """Logits (..., V) of `hidden`'s output, in at least float32."""
        return at_least_float32(F.linear(output_BSD, cast(Tensor, self.transformer["wte"].weight)))

    def hidden(
        self,
        tokens: Tensor,
        num_steps: tuple[int, int] | None = None,
        initial_state: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, MoEHuginnOutput]:
        """All but the head: (what `unembed` turns into logits (B, S, D), the output without its logits), see `forward`.

        A caller that needs few logits applies `unembed` to few positions. With a context, the attentions of every
        recurrence call its `extend`, in the same order in every pass of equal depth.
        """
        n, k = self._depth(num_steps)
        parts = self.transformer
        ln_f, wte = parts["ln_f"], cast(nn.Embedding, parts["wte"])
        _require_tokens(tokens, self.config.padded_vocab_size)
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"a sequence of {tokens.shape[1]} tokens is longer than {self.config.block_size=}")

        e_BSD = wte(tokens) * math.sqrt(self.config.n_embd)
        e_BSD, _ = self._blocks("prelude", e_BSD, context)
        calls = []  # statistics of the MoE calls that count
        if self.moe_at_injection:
            z_BSD, routing = parts["moe"](e_BSD)
            e_BSD = parts["moe_norm"](e_BSD + z_BSD if self.config.moe_residual else z_BSD)
            calls.append(routing)

        s_BSD = last_BSD = self._first_state(e_BSD, initial_state, context)
        with torch.no_grad():  # truncated backpropagation: neither e nor the weights hear from these
            for _ in range(n):
                last_BSD, (s_BSD, _) = s_BSD, self._recurrence(s_BSD, e_BSD, context)
        for _ in range(k):
            last_BSD, (s_BSD, routings) = s_BSD, self._recurrence(s_BSD, e_BSD, context)
            calls.extend(routings)

        latents_BSD = ln_f(s_BSD)
        output_BSD = ln_f(self._blocks("coda", latents_BSD, context)[0])
        with torch.no_grad():
            residual = at_least_float32(s_BSD - last_BSD).norm(dim=-1).mean()
            state_norm = at_least_float32(s_BSD).norm(dim=-1).mean()
        nothing = torch.zeros_like(residual)
        return output_BSD, MoEHuginnOutput(
            logits=torch.empty(0),
            latents=latents_BSD,
            moe=summarise(calls, self.config.num_experts, nothing) if self.config.num_experts > 0 else None,
            recurrent_residual=residual,
            state_norm=state_norm,
        )

    def _recurrence(
        self, s_BSD: Tensor, e_BSD: Tensor, context: Context | None
    ) -> tuple[Tensor, list[RoutingStatistics]]:
        """s_i = core(adapter(concat[s_{i-1}, e])), with the state in the first half."""
        return self._blocks("core_block", self.transformer["adapter"](torch.cat([s_BSD, e_BSD], dim=-1)), context)

    def _blocks(self, name: str, x_BSD: Tensor, context: Context | None) -> tuple[Tensor, list[RoutingStatistics]]:
        routings = []
        for block in cast(nn.ModuleList, self.transformer[name]):
            x_BSD, routing = block(x_BSD, context)
            if routing is not None:
                routings.append(routing)
        return x_BSD, routings

    def _depth(self, num_steps: tuple[int, int] | None) -> tuple[int, int]:
        mean, backprop = self.config.mean_recurrence, self.config.mean_backprop_depth
        n, k = (max(mean - backprop, 0), min(mean, backprop)) if num_steps is None else map(int, num_steps)
        if n < 0 or k < 0:
            raise ValueError(f"num_steps={(n, k)} must not be negative")
        return n, k

    def _first_state(self, e_BSD: Tensor, given: Tensor | None, context: Context | None) -> Tensor:
        if given is None and context is not None:
            positions_BS = context.position_BS.cpu()
            drawn = torch.from_numpy(draw_initial_state(0, int(positions_BS.max()) + 1, e_BSD.shape[2]))
            given = drawn[positions_BS]
        elif given is None:
            given = torch.from_numpy(draw_initial_state(0, e_BSD.shape[1], e_BSD.shape[2])).expand(e_BSD.shape)
        if given.shape != e_BSD.shape:
            raise ValueError(f"initial_state has shape {tuple(given.shape)}, not {tuple(e_BSD.shape)}")
        return given.to(e_BSD)


def _require_tokens(tokens: Tensor, rows: int) -> None:
    """Raises ValueError, before the embedding fails on some devices by an assertion, unless all ids have a row."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise ValueError(
            f"tokens must be integers of shape (batch, sequence), not {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    wrong = tokens[(tokens < 0) | (tokens >= rows)]
    if wrong.numel():
        raise ValueError(f"tokens holds {int(wrong[0])}, but the model's ids are 0 to {rows - 1}")
