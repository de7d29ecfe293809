"""Generation of token ids: one compiled program for the prompts and one compiled loop over new tokens.

Rows of a batch are independent: each has its own length, its own exits and its own end. Prompts are padded on the
right; what a padded position leaves in the cache lies beyond the row's own positions and is overwritten before it is
seen.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_huginn.config.checks import require
from jax_huginn.inference import cache as caches
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.sampling import Sampling, choose
from jax_huginn.inference.thinking import Depth, Thought, think_prompts, think_tokens
from jax_huginn.model import functional, initializers
from jax_huginn.model.cache import Cache
from jax_huginn.model.huginn import MoEHuginnModel

PROMPT_MULTIPLE = 32  # prompts are padded to multiples of it, so that few lengths are compiled


@dataclass(frozen=True)
class Generated:
    """One row's result."""

    prompt: list[int]
    tokens: list[int]
    """New tokens only; the last one is the stop token if `finish_reason` is eos."""
    steps: list[int]
    """steps[i]: recurrences of the position whose logits gave tokens[i]."""
    logprobs: list[float]
    """Log-probability of each token under the model, before penalties and filters."""
    finish_reason: str
    """eos, stop (`on_tokens` ended the row), length (max_new_tokens), context (model.max_length) or interrupted."""


@dataclass(frozen=True)
class Totals:
    """What a call of `generate` cost."""

    tokens: int
    """New tokens of all rows."""
    used: int
    """Recurrences that new tokens used, summed over rows; a row's last token is never computed."""
    computed: int
    """Row-recurrences that were computed for them, exited and finished rows included."""
    prompt_used: int
    prompt_computed: int
    """The same of the prompts' tokens, padding included."""
    cache_bytes: int
    compile_seconds: float
    prompt_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time of the decoding loop; the first of each row comes from the prompt's logits."""
        return self.tokens / self.decode_seconds


class _Rules(NamedTuple):
    """What the compiled programs depend on beside the model."""

    depth: Depth
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    warm_start: bool
    max_new_tokens: int


class _Inputs(NamedTuple):
    """What stays the same from token to token."""

    length_B: jax.Array
    seed_B: jax.Array
    state_LD: jax.Array
    """s_0 of every position of the cache."""


class _Made(NamedTuple):
    """The text so far, small enough to be fetched often."""

    number: jax.Array
    """Tokens made, the same for all rows that have not finished."""
    finished_B: jax.Array
    tokens_BN: jax.Array
    steps_BN: jax.Array
    logprobs_BN: jax.Array
    used: jax.Array
    computed: jax.Array


class _Carry(NamedTuple):
    """Everything that changes from token to token."""

    made: _Made
    cache: Cache
    token_B: jax.Array
    """The newest token of every row, which is not in the cache yet."""
    state_B1D: jax.Array
    """The last state of the token before it."""
    seen_BV: jax.Array
    """Tokens of prompt and text, for the repetition penalty; (B,0) without one."""


def generate(
    model: MoEHuginnModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    recurrence: int | None = None,
    exit: Exit | None = None,
    policy: caches.Policy = "full",
    budget: int = 0,
    warm_start: bool = False,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: Callable[[int, list[int]], int | None] | None = None,
    tokens_per_call: int = 16,
    memory_limit: int | None = None,
) -> tuple[list[Generated], Totals]:
    """Continue every prompt, all in one batch.

    Args:
        prompts: token ids, at least one a row.
        recurrence: recurrences of a token, or the most of them with `exit`; default: `recurrence.mean` of the config.
        policy: of the cache, see `inference.cache`; `budget` is the number of slots for "mod".
        warm_start: a new token starts from the last state of the token before it, not from the fixed s_0.
        seeds: one a row; default: 0, 1, ... A row's text depends on its own seed alone.
        stop_tokens: tokens that end a row, such as the tokenizer's EOS.
        on_tokens: called as (row, new tokens) every `tokens_per_call` tokens; a number ends the row after that many of
            them. Ctrl-C then ends all rows, and what was made is returned.
        memory_limit: bytes that the cache may take; default: what the device has free.

    Raises:
        UserError: a prompt that is empty, too long or not of this vocabulary, or a cache that does not fit.
    """
    config, rows = model.config, len(prompts)
    most = config.model.max_length
    recurrence = config.recurrence.mean if recurrence is None else recurrence
    require(recurrence > 0, f"recurrence={recurrence} must be positive")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be positive")
    _require_prompts(model, prompts)
    longest = max(map(len, prompts))
    padded = min(-(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, most)
    room = min(max(longest + max_new_tokens, padded), most)
    slots = caches.slots_of(policy, budget, recurrence)
    size = caches.require_room(config, rows, room, slots, memory_limit)

    depth = Depth(recurrence, exit, slots)
    rules = _Rules(depth, sampling or Sampling(), tuple(stop_tokens), warm_start, max_new_tokens)
    graphdef, params = functional.split(model.cast())
    tokens_BS = np.zeros((rows, padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    inputs = _Inputs(
        jnp.asarray(lengths),
        jnp.asarray(np.asarray(range(rows) if seeds is None else seeds, np.uint32)),
        jnp.asarray(initializers.fixed_state(0, room, config.model.width), config.model.dtype),
    )

    clock = _Clock()
    program = _compiled(_prefill, graphdef, rules, params, inputs, tokens_BS)
    compiling = clock.lap()
    carry, prompt_used, prompt_computed = jax.block_until_ready(program(params, inputs, tokens_BS))
    prefilling = clock.lap()
    program = _compiled(_decode, graphdef, rules, params, inputs, carry, np.int32(0))
    compiling += clock.lap()

    made, before, interrupted = jax.device_get(carry.made), 0, False
    ends = np.full(rows, max_new_tokens)
    try:
        while True:
            if on_tokens is not None:
                for row, count in enumerate(np.minimum(_counts(made, lengths, most, rules), ends)):
                    new = made.tokens_BN[row, before:count].tolist()
                    kept = on_tokens(row, new) if new else None
                    if kept is not None:
                        ends[row] = before + kept
                made = made._replace(finished_B=made.finished_B | (ends < made.number))
                carry = carry._replace(made=carry.made._replace(finished_B=jnp.asarray(made.finished_B)))
            before = int(made.number)
            if before >= max_new_tokens or made.finished_B.all():
                break
            until = max_new_tokens if on_tokens is None else min(before + tokens_per_call, max_new_tokens)
            carry = program(params, inputs, carry, np.int32(until))
            made = jax.device_get(carry.made)
    except KeyboardInterrupt:
        interrupted = True
    decoding = clock.lap()

    counts = _counts(made, lengths, most, rules)
    results = []
    for row, prompt in enumerate(prompts):
        count = min(counts[row], int(ends[row]))
        tokens = made.tokens_BN[row, :count].tolist()
        if ends[row] < max_new_tokens:
            reason = "stop"
        elif tokens and tokens[-1] in rules.stop_tokens:
            reason = "eos"
        elif count == max_new_tokens:
            reason = "length"
        else:
            reason = "interrupted" if interrupted and not made.finished_B[row] else "context"
        steps, logprobs = made.steps_BN[row, :count].tolist(), made.logprobs_BN[row, :count].tolist()
        results.append(Generated(list(prompt), tokens, steps, logprobs, reason))
    return results, Totals(
        sum(len(result.tokens) for result in results), int(made.used), int(made.computed),
        int(prompt_used), int(prompt_computed), size, compiling, prefilling, decoding,
    )  # fmt: skip


def _require_prompts(model: MoEHuginnModel, prompts: Sequence[Sequence[int]]) -> None:
    most, vocabulary = model.config.model.max_length, model.config.model.vocab_size
    require(len(prompts) > 0, "there is no prompt")
    for row, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {row} is empty")
        require(len(prompt) < most, f"prompt {row} has {len(prompt)} tokens; model.max_length={most} must leave room")
        require(
            min(prompt) >= 0 and max(prompt) < vocabulary,
            f"prompt {row} has a token outside the vocabulary of {vocabulary}",
        )


def _counts(made: Any, lengths: np.ndarray, most: int, rules: _Rules) -> list[int]:
    """Tokens of each row so far: up to its stop token or the end of the context."""
    counts = []
    for row, length in enumerate(lengths):
        count = min(int(made.number), most - int(length))
        ends = np.flatnonzero(np.isin(made.tokens_BN[row, :count], rules.stop_tokens))
        counts.append(int(ends[0]) + 1 if ends.size else count)
    return counts


# ---- Compiled programs ----------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(graphdef: nnx.GraphDef, rules: _Rules, params: Any, inputs: _Inputs, tokens_BS: jax.Array):
    """The carry with the first new token; recurrences that the prompts used, and that were computed for them."""
    model = nnx.merge(graphdef, params)
    rows, length = tokens_BS.shape
    thought = think_prompts(model, rules.depth, tokens_BS, inputs.length_B, inputs.state_LD)
    seen_BV = jnp.zeros((rows, 0), bool)
    if rules.sampling.repetition_penalty != 1:
        vocabulary = model.config.model.vocab_size
        tokens_BS = jnp.where(jnp.arange(length) < inputs.length_B[:, None], tokens_BS, vocabulary)
        seen_BV = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], tokens_BS].set(True, mode="drop")
    nothing = _Made(
        number=jnp.zeros((), jnp.int32),
        finished_B=jnp.zeros(rows, bool),
        tokens_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
        steps_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
        logprobs_BN=jnp.zeros((rows, rules.max_new_tokens), thought.logits_BV.dtype),
        used=jnp.zeros((), jnp.int32),
        computed=jnp.zeros((), jnp.int32),
    )
    most = model.config.model.max_length
    return _next_token(rules, inputs, most, nothing, seen_BV, thought), thought.used, thought.computed


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(graphdef: nnx.GraphDef, rules: _Rules, params: Any, inputs: _Inputs, carry: _Carry, until: jax.Array):
    """Tokens until `until` have been made or all rows have finished."""
    model = nnx.merge(graphdef, params)

    def token(carry: _Carry) -> _Carry:
        made = carry.made
        index_B = inputs.length_B + made.number - 1
        start_B1D = carry.state_B1D if rules.warm_start else inputs.state_LD.at[index_B].get(mode="clip")[:, None]
        thought = think_tokens(model, rules.depth, carry.cache, carry.token_B, index_B, made.finished_B, start_B1D)
        made = made._replace(used=made.used + thought.used, computed=made.computed + thought.computed)
        return _next_token(rules, inputs, model.config.model.max_length, made, carry.seen_BV, thought)

    return lax.while_loop(lambda carry: (carry.made.number < until) & ~carry.made.finished_B.all(), token, carry)


def _next_token(rules: _Rules, inputs: _Inputs, most: int, made: _Made, seen_BV: jax.Array, thought: Thought) -> _Carry:
    """The carry with one more token, chosen from the logits of a thought; `most` is the context's length."""
    rows_B = jnp.arange(thought.steps_B.shape[0])
    count_B = jnp.broadcast_to(made.number, rows_B.shape)
    token_B, logprob_B = choose(rules.sampling, thought.logits_BV, seen_BV, inputs.seed_B, count_B)
    finished_B = made.finished_B | (inputs.length_B + made.number + 1 >= most)
    for stop in rules.stop_tokens:
        finished_B |= token_B == stop
    made = made._replace(
        number=made.number + 1,
        finished_B=finished_B,
        tokens_BN=made.tokens_BN.at[:, made.number].set(token_B),
        steps_BN=made.steps_BN.at[:, made.number].set(thought.steps_B),
        logprobs_BN=made.logprobs_BN.at[:, made.number].set(logprob_B),
    )
    seen_BV = seen_BV.at[rows_B, token_B].set(True, mode="drop")
    return _Carry(made, thought.cache, token_B, thought.state_B1D, seen_BV)


def _compiled(function: Any, graphdef: nnx.GraphDef, rules: _Rules, *inputs: Any) -> Callable[..., Any]:
    """A program for inputs of these shapes, compiled before it runs, so that its time can be reported apart."""
    leaves, structure = jax.tree.flatten(jax.tree.map(_shape_of, inputs))
    return _compile(function, graphdef, rules, structure, tuple(leaves))


@functools.lru_cache(maxsize=32)
def _compile(function: Any, graphdef: nnx.GraphDef, rules: _Rules, structure: Any, leaves: tuple) -> Callable[..., Any]:
    return function.lower(graphdef, rules, *jax.tree.unflatten(structure, leaves)).compile()


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


class _Clock:
    """Time since it was read last."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before
