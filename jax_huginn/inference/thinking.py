"""From the tokens of whole prompts, which think side by side, to logits and a cache.

Recurrences are run until all tokens have exited. An exited token keeps its state and writes nothing more, so the others
see it as it was at its last recurrence; so do later tokens, wherever they think deeper.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.inference import cache as caches
from jax_huginn.inference import exits
from jax_huginn.inference.exits import Exit
from jax_huginn.model.blocks import Positions
from jax_huginn.model.cache import KV, Cache
from jax_huginn.model.huginn import MoEHuginnModel


class Depth(NamedTuple):
    """How long a token may think; a compiled program depends on it."""

    most: int | jax.Array
    """Recurrences of a token that does not exit."""
    exit: Exit | None
    slots: int
    """Slots of the core's cache."""


class Thought(NamedTuple):
    """The result for the last token of every row."""

    cache: Cache
    logits_BV: jax.Array
    state_B1D: jax.Array
    """After the last recurrence."""
    steps_B: jax.Array
    """Recurrences used."""
    used_B: jax.Array
    """Recurrences that the row's tokens used together."""
    computed_B: jax.Array
    """Recurrences that were computed for them: exited and padded tokens are computed along."""


class _Progress(NamedTuple):
    """What changes from recurrence to recurrence."""

    step: jax.Array
    """Recurrences done."""
    state_BSD: jax.Array
    cache: Cache
    kept: tuple[KV, ...]
    """All slots of the core's cache, where `cache` is the window of a prompt."""
    done_BS: jax.Array
    steps_BS: jax.Array
    memory: Any


def think_prompts(
    model: MoEHuginnModel, depth: Depth, tokens_BS: jax.Array, length_B: jax.Array, state_LD: jax.Array
) -> Thought:
    """Prompts padded on the right, with an empty cache of L positions.

    At recurrence i all tokens of a prompt see each other as they are after min(i, their own last) recurrences; the
    cache's policy decides only what is kept of that. So a cache of one slot, the window, serves the computation.
    """
    rows, length = tokens_BS.shape
    empty = caches.allocate(model.config, rows, state_LD.shape[0], depth.slots)
    window = caches.allocate(model.config, rows, length, 1)
    at = model.positions(length)
    at = at._replace(index_BS=jnp.broadcast_to(jnp.arange(length), tokens_BS.shape))
    injected_BSD, _, window = model.inject(tokens_BS, at, window)
    assert window is not None

    def recur(now: _Progress, here: Positions) -> tuple[jax.Array, Cache, tuple[KV, ...]]:
        state_BSD, _, window = model.recur(injected_BSD, now.state_BSD, here, now.cache)
        assert window is not None
        # Exited tokens fill the slots of their deeper recurrences, but do not replace what earlier ones left there.
        where_BS = None if depth.exit is None else ~now.done_BS | (now.step < depth.slots)
        return state_BSD, window, caches.place(now.kept, window.core, now.step % depth.slots, where_BS)

    padding_BS = jnp.arange(length) >= length_B[:, None]
    state_BSD = jnp.broadcast_to(state_LD[:length], injected_BSD.shape)
    end = until_done(model, depth, recur, state_BSD, at, window, empty.core, padding_BS)
    core = lax.fori_loop(  # where all exited early
        end.step, depth.slots, lambda slot, core: caches.place(core, end.cache.core, slot), end.kept
    )
    _, y_BSD, window = model.read_out(end.state_BSD, at, end.cache)
    assert window is not None
    last_B11 = (length_B - 1)[:, None, None]
    y_B1D, state_B1D = (jnp.take_along_axis(x, last_B11, axis=1) for x in (y_BSD, end.state_BSD))
    prelude, coda = caches.place(empty.prelude, window.prelude, 0), caches.place(empty.coda, window.coda, 0)
    return Thought(
        cache=Cache(prelude, core, coda),
        logits_BV=model.head(y_B1D)[:, 0],
        state_B1D=state_B1D,
        steps_B=jnp.take_along_axis(end.steps_BS, last_B11[:, 0], axis=1)[:, 0],
        used_B=jnp.sum(end.steps_BS, axis=1, dtype=jnp.int32),
        computed_B=jnp.full(rows, end.step * length),
    )


def until_done(
    model: MoEHuginnModel,
    depth: Depth,
    recur: Callable[[_Progress, Positions], tuple[jax.Array, Cache, tuple[KV, ...]]],
    state_BSD: jax.Array,
    at: Positions,
    cache: Cache,
    kept: tuple[KV, ...],
    idle_BS: jax.Array,
) -> _Progress:
    """Recurrences until every token that is not idle has exited or has had `depth.most`."""
    rule = depth.exit
    steps_BS = jnp.where(idle_BS, 0, depth.most if rule is None else 0).astype(jnp.int32)
    memory = None if rule is None else exits.begin(rule, state_BSD, model.config.model.vocab_size)
    start = _Progress(jnp.zeros((), jnp.int32), state_BSD, cache, kept, idle_BS, steps_BS, memory)
    if rule is None:

        def always(_: Any, now: _Progress) -> _Progress:
            state_BSD, cache, kept = recur(now, at)
            return now._replace(step=now.step + 1, state_BSD=state_BSD, cache=cache, kept=kept)

        return lax.fori_loop(0, depth.most, always, start)

    def once(now: _Progress) -> _Progress:
        here = at._replace(index_BS=jnp.where(now.done_BS, model.config.model.max_length, at.index_BS))
        new_BSD, cache, kept = recur(now, here)
        state_BSD = jnp.where(now.done_BS[..., None], now.state_BSD, new_BSD)
        step = now.step + 1
        steps_BS = jnp.where(now.done_BS, now.steps_BS, step)

        def test() -> tuple[jax.Array, Any, tuple[KV, ...]]:
            coda, logits_BSV = cache.coda, None
            if rule.reads_predictions:
                _, y_BSD, read = model.read_out(state_BSD, here, cache)
                assert read is not None
                coda, logits_BSV = read.coda, model.head(y_BSD)
            step_BS = jnp.broadcast_to(step, now.done_BS.shape)
            exits_BS, memory = exits.decide(rule, step_BS, state_BSD, logits_BSV, now.memory)
            return now.done_BS | exits_BS, memory, coda

        untested = (now.done_BS, now.memory, cache.coda)
        done_BS, memory, coda = test() if rule.every == 1 else lax.cond(rule.tests(step), test, lambda: untested)
        return _Progress(step, state_BSD, cache._replace(coda=coda), kept, done_BS, steps_BS, memory)

    return lax.while_loop(lambda now: (now.step < depth.most) & ~now.done_BS.all(), once, start)
