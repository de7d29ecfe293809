"""Greedy generation: the prompts are read at once, then one token of every row at a time over a cache."""

from collections.abc import Callable, Sequence

import torch

from .cache import Cache
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
    Prompts of different lengths share a batch; rows are independent, see `Cache`.
    """
    if not all(prompts):
        raise ValueError("a prompt must have at least one token")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    new: list[list[int]] = [[] for _ in prompts]

    def goes_on(row: int) -> bool:
        fits = len(prompts[row]) + len(new[row]) < model.config.block_size
        return fits and len(new[row]) < limits[row] and not (new[row] and finished(row, new[row]))

    cache = Cache(model, num_steps)
    running = [row for row in range(len(prompts)) if goes_on(row)]
    unread = [prompts[row] for row in running]
    while running:
        output_BSD = cache.read(unread)
        last_BD = torch.stack([output_SD[len(text) - 1] for output_SD, text in zip(output_BSD, unread, strict=True)])
        for row, token in zip(running, model.unembed(last_BD).argmax(dim=-1).tolist(), strict=True):
            new[row].append(token)
        kept = [place for place, row in enumerate(running) if goes_on(row)]
        cache.select(kept)
        running = [running[place] for place in kept]
        unread = [new[row][-1:] for row in running]
    return new
