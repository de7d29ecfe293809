"""Self-speculation by depth: tokens are drafted at few recurrences and verified together at all of them.

A cycle drafts `drafted` tokens one after the other, reads them and the token before them in one pass at full depth, and
takes the longest beginning that this pass would have chosen, and its own choice for the place after. So the text is
that of plain decoding, sampled text too, since a row's random numbers belong to its places.

The pass at full depth writes the keys and values of all its positions anew, over what drafts left in the cache. What
it leaves beyond the tokens that were taken is replaced by the next cycle before anything sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.config.checks import require
from jax_huginn.inference.exits import Exit
from jax_huginn.model.cache import Cache
from jax_huginn.model.huginn import MoEHuginnModel

if TYPE_CHECKING:
    from jax_huginn.inference.programs import Carry


class Drafts(NamedTuple):
    """How a cycle drafts."""

    number: int
    """Tokens."""
    recurrence: int
    """Recurrences of each."""


def require_exact(drafts: Drafts, recurrence: int, exit: Exit | None, policy: str, warm_start: bool) -> None:
    """Raise UserError where the text could not be that of plain decoding."""
    require(0 < drafts.number <= 16, f"speculate={drafts.number} must lie in [1, 16]")
    require(
        0 < drafts.recurrence < recurrence,
        f"draft_recurrence={drafts.recurrence} must lie in [1, {recurrence - 1}], below recurrence={recurrence}",
    )
    require(exit is None, f"speculation needs a fixed depth: leave out exit={exit and exit.name}, or the drafts")
    require(policy == "full", f"speculation needs cache.policy=full, not {policy}: a draft's slots must be its own")
    require(not warm_start, "speculation cannot have a warm start: the tokens of a cycle are verified side by side")


def read(
    model: MoEHuginnModel,
    cache: Cache,
    tokens_BS: jax.Array,
    index_BS: jax.Array,
    state_LD: jax.Array,
    recurrence: int | jax.Array,
    slots: int | jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits (B,S,V) after tokens that follow those in the cache, and the cache with them, at a fixed depth.

    Args:
        index_BS: positions; a token at one past the end of the cache is not written to it.
        state_LD: s_0 of every position.
    """
    at = model.positions(index_BS)
    injected_BSD, _, cache = _kept(model.inject(tokens_BS, at, cache))

    def once(step: jax.Array, now: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        state_BSD, _, cache = _kept(model.recur(injected_BSD, now[0], at, now[1], step % slots))
        return state_BSD, cache

    state_BSD = state_LD.at[index_BS].get(mode="clip").astype(injected_BSD.dtype)
    state_BSD, cache = lax.fori_loop(0, recurrence, once, (state_BSD, cache))
    _, y_BSD, cache = _kept(model.read_out(state_BSD, at, cache))
    return model.head(y_BSD), cache


def cycle(
    model: MoEHuginnModel,
    drafts: Drafts,
    recurrence: int | jax.Array,
    length_B: jax.Array,
    state_LD: jax.Array,
    carry: Carry,
    append: Callable[[Carry, jax.Array, jax.Array], Carry],
) -> Carry:
    """One to `drafts.number` + 1 new tokens in every row that has not finished.

    Args:
        append: (carry, logits_BV, ready_B) -> the carry with one more token in the rows that are ready.
    """
    idle_B = carry.made.finished_B
    first_B = jnp.where(idle_B, model.config.model.max_length, length_B + carry.made.number_B - 1)

    def draft(place: jax.Array, now: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        ahead, tokens_SB = now
        index_B1 = (first_B + place)[:, None]
        logits_B1V, cache = read(
            model, ahead.cache, ahead.token_B[:, None], index_B1, state_LD, drafts.recurrence, recurrence
        )
        ahead = append(ahead._replace(cache=cache), logits_B1V[:, 0], ~ahead.made.finished_B)
        return ahead, tokens_SB.at[place + 1].set(ahead.token_B)

    tokens_SB = jnp.tile(carry.token_B, (drafts.number + 1, 1))
    ahead, tokens_SB = lax.fori_loop(0, drafts.number, draft, (carry, tokens_SB))
    index_BS = first_B[:, None] + jnp.arange(drafts.number + 1)
    logits_BSV, cache = read(model, ahead.cache, tokens_SB.T, index_BS, state_LD, recurrence, recurrence)

    def take(place: jax.Array, now: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        carry, alike_B = now
        ready_B = alike_B & ~carry.made.finished_B
        carry = append(carry, logits_BSV[:, place], ready_B)
        right_B = ready_B & (carry.token_B == tokens_SB.at[place + 1].get(mode="clip")) & (place < drafts.number)
        made = carry.made._replace(accepted_B=carry.made.accepted_B + right_B)
        return carry._replace(made=made), right_B

    before_B = carry.made.number_B
    carry, _ = lax.fori_loop(0, drafts.number + 1, take, (carry._replace(cache=cache), ~idle_B))
    made, read_out = carry.made, drafts.number + 1
    made = made._replace(
        used_B=made.used_B + recurrence * (made.number_B - before_B),
        computed_B=made.computed_B + drafts.number * drafts.recurrence + read_out * recurrence,
        core_runs_1=made.core_runs_1 + drafts.number * drafts.recurrence + recurrence,
        readouts_1=made.readouts_1 + read_out,
        drafted_B=made.drafted_B + jnp.where(idle_B, 0, drafts.number),
    )
    return carry._replace(made=made)


def _kept(result: tuple[Any, Any, Cache | None]) -> tuple[Any, Any, Cache]:
    first, second, cache = result
    assert cache is not None
    return first, second, cache
