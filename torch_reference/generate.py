"""Greedy generation without a cache: correct and slow, every new token costs a whole forward pass."""

from collections.abc import Callable, Sequence

import torch

from .model import MoEHuginnModel


@torch.no_grad()
def greedy(
    model: MoEHuginnModel,
    prompts: Sequence[Sequence[int]],
    num_steps: tuple[int, int],
    max_new_tokens: int | Sequence[int],
    finished: Callable[[int, list[int]], bool] = lambda row, new_tokens: False,
) -> list[list[int]]:
    """The most likely continuation of every prompt, at most `max_new_tokens` long (one number, or one for each row).

    A row ends once `finished(row, its new tokens)` holds, the last token included, or at the model's block_size.
    Prompts of different lengths share a batch: padding follows a row's end, where causality hides it, and the initial
    state depends on the position alone, so rows are independent.
    """
    device = model.device
    rows = [list(prompt) for prompt in prompts]
    if not all(rows):
        raise ValueError("a prompt must have at least one token")
    limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else max_new_tokens
    new: list[list[int]] = [[] for _ in rows]
    running = list(range(len(rows)))
    while running := [i for i in running if len(new[i]) < limits[i] and len(rows[i]) < model.config.block_size]:
        longest = max(len(rows[i]) for i in running)
        tokens_BS = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in running], device=device)
        last_B = torch.tensor([len(rows[i]) - 1 for i in running], device=device)
        output_BSD, _ = model.hidden(tokens_BS, num_steps)
        logits_BV = model.unembed(output_BSD[torch.arange(len(running), device=device), last_B])
        for i, token in zip(running, logits_BV.argmax(dim=-1).tolist(), strict=True):
            rows[i].append(token)
            new[i].append(token)
        running = [i for i in running if not finished(i, new[i])]
    return new
