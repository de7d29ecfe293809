"""Reading a text whose tokens exit each by itself: the outputs at all positions, and what they cost."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_huginn.inference import cache as caches
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.thinking import Depth, until_done
from jax_huginn.model.blocks import Positions
from jax_huginn.model.cache import KV, Cache
from jax_huginn.model.huginn import MoEHuginnModel


class Read(NamedTuple):
    """The result of `read_with_exits`."""

    y_BSD: jax.Array
    """The coda's output after norm_f, the head's input."""
    steps_BS: jax.Array
    """Recurrences that each token used; 0 for padding."""
    computed: jax.Array
    """Recurrences that were computed for every token: those of the one that took longest."""


def read_with_exits(
    model: MoEHuginnModel, rule: Exit, most: jax.Array, tokens_BS: jax.Array, length_B: jax.Array, state_SD: jax.Array
) -> Read:
    """Read texts as `thinking.think_prompts` reads a prompt: every token exits by the rule, or after `most`.

    At recurrence i a token sees another as it is after min(i, that token's last) recurrences. A prediction depends on
    the text before it alone, so it is that of the same text cut off there.

    Args:
        tokens_BS: padded on the right.
        length_B: 0 for a row that is padding; such rows keep nobody waiting.
    """
    rows, length = tokens_BS.shape
    window = caches.allocate(model.config, rows, length, 1)
    at = model.positions(length)
    at = at._replace(index_BS=jnp.broadcast_to(jnp.arange(length), tokens_BS.shape))
    injected_BSD, _, window = model.inject(tokens_BS, at, window)
    assert window is not None

    def recur(now, here: Positions) -> tuple[jax.Array, Cache, tuple[KV, ...]]:
        state_BSD, _, window = model.recur(injected_BSD, now.state_BSD, here, now.cache)
        assert window is not None
        return state_BSD, window, ()

    padding_BS = jnp.arange(length) >= length_B[:, None]
    state_BSD = jnp.broadcast_to(state_SD, injected_BSD.shape).astype(injected_BSD.dtype)
    end = until_done(model, Depth(most, rule, 1), recur, state_BSD, at, window, (), padding_BS)
    _, y_BSD, _ = model.read_out(end.state_BSD, at, end.cache)
    return Read(y_BSD, end.steps_BS, end.step)
