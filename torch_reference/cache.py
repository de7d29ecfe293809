"""Keys and values of the tokens so far, so that a new token costs one position and not the whole sequence.

Every recurrence keeps its own: a token at recurrence i attends to what earlier tokens were at recurrence i, as it does
without a cache.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import Context
from .model import MoEHuginnModel


class Cache:
    """Rows of text that grow, read at one depth; without gradients.

    Rows may be padded on the right. Padding takes a place in the cache that no other token sees, and positions, and
    with them the initial state, count real tokens alone, so rows are independent.

    Args:
        num_steps: (n, k) as in `MoEHuginnModel.forward`.
    """

    def __init__(self, model: MoEHuginnModel, num_steps: tuple[int, int]):
        self.model, self.num_steps = model, num_steps
        self.real_BL = torch.zeros(0, 0, dtype=torch.bool)  # which cached tokens are no padding
        # (keys, values), each (B, H, L, K), of every attention of every recurrence in the order of a forward pass
        self.layers: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], keep: bool = True) -> Tensor:
        """The model's output before the head, (B, S, D), for each row's next tokens.

        Args:
            texts: one a row; a cache of one row serves any number of texts that follow it.
            keep: whether these tokens stay in the cache.
        """
        S, device = max(map(len, texts)), self.model.device
        tokens_BS = torch.tensor([[*text, *[0] * (S - len(text))] for text in texts], device=device)
        real_BL = torch.tensor([[True] * len(text) + [False] * (S - len(text)) for text in texts], device=device)
        if self.layers:
            real_BL = torch.cat([self.real_BL.expand(len(texts), -1), real_BL], dim=1)
        layers = itertools.count()
        context = context_of(real_BL, S, lambda k_BHSK, v_BHSK: self._extend(next(layers), k_BHSK, v_BHSK, keep))
        output_BSD, _ = self.model.hidden(tokens_BS, self.num_steps, context=context)
        if keep:
            self.real_BL = real_BL
        return output_BSD

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows alone."""
        self.real_BL = self.real_BL[rows]
        self.layers = [(k_BHLK[rows], v_BHLK[rows]) for k_BHLK, v_BHLK in self.layers]

    def _extend(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The cached keys and values of one attention, followed by new ones."""
        if layer < len(self.layers):
            k_BHLK, v_BHLK = (
                torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2)
                for old, new in zip(self.layers[layer], (k_BHLK, v_BHLK), strict=True)
            )
        if keep:
            self.layers[layer : layer + 1] = [(k_BHLK, v_BHLK)]
        return k_BHLK, v_BHLK


def context_of(real_BL: Tensor, S: int, extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Context:
    """Where the last S of L tokens are, and what they see: the tokens up to themselves that are no padding."""
    L, device = real_BL.shape[1], real_BL.device
    position_BS = (real_BL.long().cumsum(dim=1) - 1).clamp(min=0)[:, L - S :]
    own_S1, index_L = torch.arange(L - S, L, device=device)[:, None], torch.arange(L, device=device)
    # A padding token sees itself, since a softmax over nothing is not a number.
    visible_BSL = (index_L <= own_S1) & real_BL[:, None] | (index_L == own_S1)
    return Context(position_BS, visible_BSL, extend)
