"""Depth-wise continuous batching: every row thinks about its own token, at its own recurrence.

A round gives rows that have a new token its place in the text (the prelude), thinks until enough rows have stopped or
nobody can think on, and reads out those that have (coda and head). Prelude, coda and head cost about as much as a
recurrence whatever number of rows they serve, so rows wait for each other a little, not for the slowest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.config.checks import require
from jax_huginn.inference import cache as caches
from jax_huginn.inference import exits
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.thinking import Depth
from jax_huginn.model.blocks import Positions
from jax_huginn.model.cache import Cache
from jax_huginn.model.huginn import MoEHuginnModel


class Schedule(NamedTuple):
    """Which rows share a run of the core, and when those that have stopped are read out."""

    width: int = 0
    """Rows of a run; of more rows in flight, each with its cache, those with the fewest tokens think. 0: all."""
    one_in: int = 3
    """One in so many unfinished rows has to wait before a read-out, unless nobody can think on; 1 is lockstep."""

    def of(self, rows: int) -> "Schedule":
        """The same, for so many rows."""
        require(self.width >= 0, f"width={self.width} must not be negative; 0 is all rows")
        require(self.one_in > 0, f"one_in={self.one_in} must be positive; 1 is lockstep")
        return self._replace(width=min(self.width or rows, rows))


class InFlight(NamedTuple):
    """The token that every row thinks about."""

    injected_B1D: jax.Array
    state_B1D: jax.Array
    """Where no recurrence has run yet: that of the token before."""
    step_B1: jax.Array
    """Recurrences done; 0 for a token that is new."""
    memory: exits.Memory | None
    """Of the exit criterion."""


class Round(NamedTuple):
    """What a round did."""

    in_flight: InFlight
    cache: Cache
    logits_BV: jax.Array
    ready_B: jax.Array
    """Rows whose logits count."""
    core_runs: jax.Array
    computed_B: jax.Array
    """Core runs that a row was part of: rows that wait or have finished are computed along, unless others take their
    place."""


class _Rows(NamedTuple):
    """What a run of the core reads of its rows."""

    at: Positions
    limit_B1: jax.Array
    injected_B1D: jax.Array
    changing: "_Changing"


class _Changing(NamedTuple):
    """What it changes."""

    state_B1D: jax.Array
    step_B1: jax.Array
    done_B1: jax.Array
    memory: exits.Memory | None


def begin(rule: Exit | None, state_B1D: jax.Array, vocabulary: int) -> InFlight:
    """Rows with a new token after a prompt's."""
    memory = None if rule is None else exits.begin(rule, state_B1D, vocabulary)
    return InFlight(jnp.zeros_like(state_B1D), state_B1D, jnp.zeros(state_B1D.shape[:2], jnp.int32), memory)


def think_a_round(
    model: MoEHuginnModel,
    depth: Depth,
    schedule: Schedule,
    rows: InFlight,
    cache: Cache,
    token_B: jax.Array,
    index_B: jax.Array,
    idle_B: jax.Array,
    made_B: jax.Array,
    start_B1D: jax.Array,
    limit_B: jax.Array | None = None,
) -> Round:
    """One round, in which at least one row that is not idle is read out.

    Args:
        token_B: the newest token of every row, and `index_B` its position; the model has read those before.
        idle_B: rows without a token: they write nothing, and nobody waits for them.
        made_B: tokens that each row has made.
        start_B1D: the state that a new token starts from.
        limit_B: the most recurrences of each token, where it is less than `depth.most`.
    """
    nowhere, rule = model.config.model.max_length, depth.exit
    new_B1 = rows.step_B1 == 0
    at = model.positions(index_B[:, None])
    here = at._replace(index_BS=jnp.where(new_B1 & ~idle_B[:, None], at.index_BS, nowhere))
    injected_B1D, _, injected = model.inject(token_B[:, None], here, cache)
    assert injected is not None
    injected_B1D = jnp.where(new_B1[..., None], injected_B1D, rows.injected_B1D)
    state_B1D = jnp.where(new_B1[..., None], start_B1D.astype(injected_B1D.dtype), rows.state_B1D)
    at = at._replace(index_BS=jnp.where(idle_B[:, None], nowhere, at.index_BS))

    if rule is None and limit_B is None:
        cache, state_B1D = _think_to_the_end(model, depth, injected, injected_B1D, state_B1D, at)
        step_B1 = jnp.full_like(rows.step_B1, depth.most)
        ready_B, core_runs, computed_B = ~idle_B, jnp.int32(depth.most), step_B1[:, 0]
        rows = InFlight(injected_B1D, state_B1D, step_B1, None)
    else:
        memory = None
        if rule is not None:
            memory = exits.begin(rule, state_B1D, model.config.model.vocab_size)
            memory = jax.tree.map(lambda new, old: _where(new_B1, new, old), memory, rows.memory)
        limit_B1 = jnp.full_like(rows.step_B1, depth.most) if limit_B is None else limit_B[:, None]
        changing = _Changing(state_B1D, rows.step_B1, idle_B[:, None], memory)
        every = _Rows(at, limit_B1, injected_B1D, changing)
        cache, changing, core_runs, computed_B = _think(model, depth, schedule, injected, every, made_B)
        ready_B = changing.done_B1[:, 0] & ~idle_B
        rows = InFlight(injected_B1D, changing.state_B1D, changing.step_B1, changing.memory)
        reached_B = jnp.where(ready_B, index_B, nowhere)
        cache = cache._replace(core=caches.fill_deeper(cache.core, reached_B, jnp.maximum(rows.step_B1[:, 0], 1)))

    at = at._replace(index_BS=jnp.where(ready_B[:, None], at.index_BS, nowhere))
    _, y_B1D, read = model.read_out(rows.state_B1D, at, cache)
    assert read is not None
    return Round(rows, read, model.head(y_B1D)[:, 0], ready_B, core_runs, computed_B)


def _think_to_the_end(
    model: MoEHuginnModel, depth: Depth, cache: Cache, injected_B1D: jax.Array, state_B1D: jax.Array, at: Positions
) -> tuple[Cache, jax.Array]:
    """All recurrences of all rows, which are side by side as long as nobody stops early."""

    def once(step: jax.Array, now: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        slot_B = jnp.full(state_B1D.shape[0], step % depth.slots)  # one a row is read faster than one for all
        new_B1D, _, cache = model.recur(injected_B1D, now[1], at, now[0], slot_B)
        assert cache is not None
        return cache, new_B1D

    return lax.fori_loop(0, depth.most, once, (cache, state_B1D))


def _think(
    model: MoEHuginnModel, depth: Depth, schedule: Schedule, cache: Cache, every: _Rows, made_B: jax.Array
) -> tuple[Cache, _Changing, jax.Array, jax.Array]:
    """Recurrences until enough rows have stopped; also the runs of the core, and those that each row was part of."""
    rule, count = depth.exit, made_B.shape[0]
    idle_B1 = every.changing.done_B1
    unfinished = jnp.sum(~idle_B1)
    runs_a_test = 1 if rule is None else rule.every  # a token begins between tests, so all are tested together

    def unready(now: Any) -> jax.Array:
        done_B1 = now[1].done_B1
        return ~done_B1.all() & (jnp.sum(done_B1 & ~idle_B1) * schedule.one_in < unfinished)

    def once(now: Any) -> Any:
        cache, changing, core_runs, computed_B = now
        rows = every._replace(changing=changing)
        if schedule.width == count:
            cache, changing = _run(model, depth, cache, rows)
            return cache, changing, core_runs + runs_a_test, computed_B + runs_a_test
        behind_B = jnp.where(changing.done_B1[:, 0], jnp.iinfo(jnp.int32).min, -made_B)
        row_B = lax.top_k(behind_B, schedule.width)[1]
        mine: _Rows = jax.tree.map(lambda x: x[row_B], rows)
        mine = mine._replace(at=mine.at._replace(row_B=row_B))
        cache, changed = _run(model, depth, cache, mine)
        changing = jax.tree.map(lambda old, new: old.at[row_B].set(new), changing, changed)
        return cache, changing, core_runs + runs_a_test, computed_B.at[row_B].add(runs_a_test)

    return lax.while_loop(unready, once, (cache, every.changing, jnp.int32(0), jnp.zeros(count, jnp.int32)))


def _run(model: MoEHuginnModel, depth: Depth, cache: Cache, rows: _Rows) -> tuple[Cache, _Changing]:
    """The recurrences up to the next test, and the test."""
    rule, nowhere = depth.exit, model.config.model.max_length

    def recur(_: Any, now: tuple[Cache, _Changing]) -> tuple[Cache, _Changing]:
        cache, (state_B1D, step_B1, done_B1, memory) = now
        here = rows.at._replace(index_BS=jnp.where(done_B1, nowhere, rows.at.index_BS))
        new_B1D, _, cache = model.recur(rows.injected_B1D, state_B1D, here, cache, step_B1[:, 0] % depth.slots)
        assert cache is not None
        state_B1D, step_B1 = _where(done_B1, state_B1D, new_B1D), jnp.where(done_B1, step_B1, step_B1 + 1)
        return cache, _Changing(state_B1D, step_B1, done_B1 | (step_B1 >= rows.limit_B1), memory)

    was_done_B1 = rows.changing.done_B1
    now = cache, rows.changing
    cache, changing = recur(0, now) if rule is None or rule.every == 1 else lax.fori_loop(0, rule.every, recur, now)
    if rule is None or changing.memory is None:
        return cache, changing
    logits_B1V = None
    if rule.reads_predictions:
        here = rows.at._replace(index_BS=jnp.where(was_done_B1, nowhere, rows.at.index_BS))
        _, y_B1D, read = model.read_out(changing.state_B1D, here, cache)
        assert read is not None
        cache, logits_B1V = read, model.head(y_B1D)
    exits_B1, memory = exits.decide(rule, changing.step_B1, changing.state_B1D, logits_B1V, changing.memory)
    return cache, changing._replace(done_B1=changing.done_B1 | exits_B1, memory=memory)


def _where(choice_B1: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(choice_B1.reshape(choice_B1.shape + (1,) * (x.ndim - 2)), x, y)
