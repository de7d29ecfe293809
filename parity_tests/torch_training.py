"""Training in plain Torch, written from the textbook: what jax_huginn.training must equal."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jax_huginn.config.schema import Config, OptimizerConfig
from torch_reference import MoEHuginnModel
from torch_reference.model import MoEHuginnOutput

Update = Callable[[float], None]
"""Moves the weights by their gradients at a learning rate."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor  # (B, S)
    labels: Tensor  # (B, S)
    depth: tuple[int, int]  # recurrences without and with gradient
    initial_state: Tensor  # (B, S, D)


@dataclasses.dataclass(frozen=True)
class Record:
    loss: float  # log_ppl
    objective: float  # with the auxiliary losses
    grad_norm: float  # before clipping
    learning_rate: float


def train(model: MoEHuginnModel, config: Config, steps: Sequence[Sequence[MicroBatch]]) -> list[Record]:
    """One optimiser step for each of `steps`, on the mean loss of its micro-batches."""
    settings = config.optimizer
    weights = dict(model.named_parameters())
    update = {"adamw": adamw, "adam_atan2": adam_atan2, "muon": muon}[settings.name](weights, settings)
    records = []
    for step, micro_batches in enumerate(steps):
        model.zero_grad()
        outputs = [model(part.tokens, part.depth, part.initial_state, part.labels) for part in micro_batches]
        objective = torch.stack(losses(model, outputs)).mean()
        objective.backward()

        # By hand: torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm that it divides by, the textbook does not.
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if norm > settings.clip_norm:
            for gradient in gradients:
                gradient.mul_(settings.clip_norm / norm)

        rate = learning_rate(config, step)
        update(rate)
        loss = torch.stack([output.log_ppl for output in outputs]).mean()
        records.append(Record(loss.item(), objective.item(), norm.item(), rate))
    return records


def losses(model: MoEHuginnModel, outputs: Sequence[MoEHuginnOutput]) -> list[Tensor]:
    """The micro-batches' losses, every router balanced over the micro-batches so far."""
    found = []
    for number, output in enumerate(outputs):
        assert output.loss is not None
        loss = output.loss
        if output.moe is not None:
            so_far_QE = torch.stack([each.moe.counts_QE for each in outputs[: number + 1] if each.moe]).sum(0)
            share_QE = so_far_QE.to(output.moe.probability_QE) / so_far_QE.sum(-1, keepdim=True)
            balance = so_far_QE.shape[1] * (share_QE * output.moe.probability_QE).sum(-1).mean()
            loss = loss + model.config.balance_weight * (balance - output.moe.balance_loss)
        found.append(loss)
    return found


def learning_rate(config: Config, step: int) -> float:
    """Linear warmup, then constant, then a linear cooldown; `step` counts from 0."""
    settings, left = config.optimizer, config.train.steps - step
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cooldown = min(1.0, left / settings.cooldown_steps)
    return settings.learning_rate * warmup * cooldown


def decay_of(weight: Tensor, settings: OptimizerConfig) -> float:
    return settings.decay if weight.ndim == 2 else 0.0  # norms have one axis and qk_bias has four


def adamw(weights: dict[str, Tensor], settings: OptimizerConfig) -> Update:
    """torch.optim.AdamW."""
    groups = [{"params": [weight], "weight_decay": decay_of(weight, settings)} for weight in weights.values()]
    optimizer = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.eps)

    def update(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    return update


def adam_atan2(weights: dict[str, Tensor], settings: OptimizerConfig) -> Update:
    """Adam-atan2 of the public Huginn run; every expert's matrix is a tensor of its own."""
    b1, b2, moments, t = settings.b1, settings.b2, {}, 0

    @torch.no_grad()
    def update(rate: float) -> None:
        nonlocal t
        t += 1
        for name, weight in weights.items():
            g = weight.grad
            m, v = moments.get(name, (g, g**2))
            m = b1 * m + (1 - b1) * g
            v = (b2 * v + (1 - b2) * g**2).clamp(min=1e-6**2)
            moments[name] = m, v
            rms = (g / v.sqrt()).square().mean().sqrt().item()
            step = rate / max(1.0, rms) / (1 - b1**t)
            weight.mul_(1 - decay_of(weight, settings) * rate / settings.learning_rate)
            weight.sub_(step * torch.atan2(m, v.sqrt() / math.sqrt(1 - b2**t)))

    return update


def muon(weights: dict[str, Tensor], settings: OptimizerConfig) -> Update:
    """Muon on the hidden matrices and AdamW on the rest, in the weights' own precision.

    torch.optim.Muon differs in two points, see test_muon_is_torchs_own_except_its_precision_and_nesterov: its
    Newton-Schulz iteration runs in bfloat16, and its Nesterov momentum lacks the correction for the zero at the start.
    """
    hidden = {n: w for n, w in weights.items() if w.ndim == 2 and "wte" not in n and "router" not in n}
    update_rest = adamw({name: weight for name, weight in weights.items() if name not in hidden}, settings)
    momentum, beta, t = {name: torch.zeros_like(weight) for name, weight in hidden.items()}, 0.95, 0

    @torch.no_grad()
    def update(rate: float) -> None:
        nonlocal t
        t += 1
        for name, weight in hidden.items():
            g = weight.grad
            m = momentum[name] = beta * momentum[name] + (1 - beta) * g
            nesterov = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            weight.mul_(1 - decay_of(weight, settings) * rate)
            weight.sub_(rate * 0.2 * math.sqrt(max(weight.shape)) * newton_schulz(nesterov))
        update_rest(rate)

    return update


def newton_schulz(x: Tensor) -> Tensor:
    """About U V^T of x = U S V^T: five steps of Keller Jordan's quintic iteration, on the side with fewer rows."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (x.norm() + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
