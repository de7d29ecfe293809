"""MoE-Huginn in plain PyTorch: the model to read, and the one that the JAX model is held to.

A depth-recurrent language model (Geiping et al. 2025, arXiv 2502.05171): a prelude embeds the tokens, one core
is applied repeatedly to a latent state, and a coda reads out the result. A shared-expert Mixture of Experts
transforms the embedding that every recurrence receives, or replaces the MLPs of the core. The code is written to be
read, not for speed: experts run in a loop, the cache of `cache.py` grows by copies, and the model does not sample its
own depth. `layers.py` holds the dense parts, `moe.py` the experts.

The name of an array ends in its shape, one letter per axis:

    B  batch                      S  sequence                   D  model width
    V  vocabulary                 F  MLP hidden width           K  head width
    H  query heads                G  key and value heads        T  tokens, B times S
    E  routed experts             A  experts per token          M  expert hidden width
    L  positions of a cache       Q  routers

"At least float32" is `promote_types(dtype, float32)`, so that the whole model also runs in float64.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEHuginnConfig
from .initial_state import initial_state as draw_initial_state
from .layers import Attention, Context, GatedMLP, RMSNorm, at_least_float32
from .moe import MoE, RoutingStatistics, summarise

IGNORE = -100


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
        length = tokens.shape[1] if context is None else int(context.position_BS.max()) + 1
        if length > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens is longer than {self.config.block_size=}")

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
        routers = 1 if self.moe_at_injection else self.config.n_layers_in_recurrent_block
        return output_BSD, MoEHuginnOutput(
            logits=torch.empty(0),
            latents=latents_BSD,
            moe=summarise(calls, routers, self.config.num_experts, nothing) if self.config.num_experts > 0 else None,
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
