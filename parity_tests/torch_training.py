"""Training in plain Torch, written from the textbook: what jax_huginn.training must equal."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from jax_huginn.config.schema import Config
from torch_reference import MoEHuginnModel


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
    matrices = [w for name, w in model.named_parameters() if w.ndim == 2]
    norms_and_biases = [w for name, w in model.named_parameters() if w.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms_and_biases, "weight_decay": 0}],
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
    )
    records = []
    for step, micro_batches in enumerate(steps):
        optimizer.zero_grad()
        outputs = [model(part.tokens, part.depth, part.initial_state, part.labels) for part in micro_batches]
        objective = torch.stack([output.loss for output in outputs]).mean()
        objective.backward()

        # By hand: torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm that it divides by, the textbook does not.
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if norm > settings.clip_norm:
            for gradient in gradients:
                gradient.mul_(settings.clip_norm / norm)

        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        loss = torch.stack([output.log_ppl for output in outputs]).mean()
        records.append(Record(loss.item(), objective.item(), norm.item(), rate))
    return records


def learning_rate(config: Config, step: int) -> float:
    """Linear warmup, then constant, then a linear cooldown; `step` counts from 0."""
    settings, left = config.optimizer, config.train.steps - step
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cooldown = min(1.0, left / settings.cooldown_steps)
    return settings.learning_rate * warmup * cooldown
