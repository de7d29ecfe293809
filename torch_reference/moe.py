"""The Mixture of Experts: a router that chooses, a shared expert for every token, and what the router did.

The letters of shapes are those of `model.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEHuginnConfig
from .layers import at_least_float32


@dataclass
class RoutingStatistics:
    """Routing statistics of Q routers. Over several calls (placement "core") counts are summed, the rest averaged."""

    counts_QE: Tensor  # assignments that each expert received
    probability_QE: Tensor  # mean over tokens of the softmax over all experts
    first_choice_E: Tensor  # tokens that each expert was the first choice of
    entropy: Tensor  # mean over tokens of that softmax's entropy, in nats
    z_loss: Tensor  # mean squared logsumexp of the logits: the z-loss before its weight

    @property
    def counts_E(self) -> Tensor:
        return self.counts_QE.sum(0)

    @property
    def probability_E(self) -> Tensor:
        return self.probability_QE.mean(0)

    @property
    def balance_loss(self) -> Tensor:
        """E * sum_i f_i P_i, 1 when balanced, averaged over routers: the balance loss before its weight."""
        share_QE = self.counts_QE.to(self.probability_QE) / self.counts_QE.sum(-1, keepdim=True).clamp(min=1)
        return self.counts_QE.shape[1] * (share_QE * self.probability_QE).sum(-1).mean()


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
    return RoutingStatistics(
        counts_QE=torch.bincount(chosen_TA.flatten(), minlength=E)[None],
        probability_QE=log_p_TE.exp().mean(dim=0)[None],
        first_choice_E=torch.bincount(chosen_TA[:, 0], minlength=E),
        entropy=-(log_p_TE.exp() * log_p_TE).sum(dim=-1).mean(),
        z_loss=logits_TE.logsumexp(dim=-1).square().mean(),
    )


def summarise(calls: list[RoutingStatistics], routers: int, E: int, zero: Tensor) -> RoutingStatistics:
    """The statistics of routers that were called in turn; zeros when there was no call that counts."""
    if not calls:
        zero_E, zero_QE = zero.expand(E), zero.expand(routers, E)
        return RoutingStatistics(zero_QE.long(), zero_QE, zero_E.long(), zero, zero)
    by_router = [calls[router::routers] for router in range(routers)]
    return RoutingStatistics(
        counts_QE=torch.stack([torch.stack([call.counts_E for call in own]).sum(0) for own in by_router]),
        probability_QE=torch.stack([torch.stack([call.probability_E for call in own]).mean(0) for own in by_router]),
        first_choice_E=torch.stack([call.first_choice_E for call in calls]).sum(0),
        entropy=torch.stack([call.entropy for call in calls]).mean(),
        z_loss=torch.stack([call.z_loss for call in calls]).mean(),
    )
