"""The Mixture of Experts: a router that chooses, a shared expert for every token, and what the router did.

The letters of shapes are those of `model.py`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEHuginnConfig
from .layers import at_least_float32


@dataclass
class RoutingStatistics:
    """Routing statistics. Over several calls (placement "core") counts are summed and the rest is averaged."""

    counts_E: Tensor  # assignments that each expert received
    first_choice_E: Tensor  # tokens that each expert was the first choice of
    probability_E: Tensor  # mean over tokens of the softmax over all experts
    entropy: Tensor  # mean over tokens of that softmax's entropy, in nats
    z_loss: Tensor  # mean squared logsumexp of the logits: the z-loss before its weight
    balance_loss: Tensor  # E * sum_i f_i P_i, 1 when balanced: the balance loss before its weight


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
