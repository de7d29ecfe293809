"""Generation of token ids, for many prompts at once.

Rows of a batch are independent: each has its own length, its own exits and its own end. Prompts are padded on the
right; what a padded position leaves in the cache lies beyond the row's own positions and is overwritten before it is
seen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_huginn.config.checks import require
from jax_huginn.inference import cache as caches
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.programs import BY_ROW, DATA, INPUT_SPECS, Inputs, Rules, compiled, decode, prefill
from jax_huginn.inference.sampling import Sampling
from jax_huginn.inference.thinking import Depth
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.parallel.mesh import REPLICATED

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

    rows: int
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
        """Of the decoding loop, so without each row's first token, which comes from the prompt's logits."""
        return (self.tokens - self.rows) / self.decode_seconds


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
    devices: Sequence[Any] = (),
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
        memory_limit: bytes that the cache may take on a device; default: what the device has free.
        devices: rows are spread over them, and each gets a copy of the weights; default: the one that holds the model.

    Raises:
        UserError: a prompt that is empty, too long or not of this vocabulary, or a cache that does not fit.
    """
    config, rows = model.config, len(prompts)
    most = config.model.max_length
    recurrence = config.recurrence.mean if recurrence is None else recurrence
    require(recurrence > 0, f"recurrence={recurrence} must be positive")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be positive")
    _require_prompts(model, prompts)
    mesh = Mesh(np.array(devices), (DATA,)) if len(devices) > 1 else None
    share = -(-rows // max(len(devices), 1))
    places = share * max(len(devices), 1)
    padded = min(-(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, most)
    room = min(padded + max_new_tokens, most)
    slots = caches.slots_of(policy, budget, recurrence)
    size = caches.require_room(config, share, room, slots, memory_limit)

    rules = Rules(
        Depth(recurrence, exit, slots), sampling or Sampling(), tuple(stop_tokens), warm_start, max_new_tokens, mesh
    )
    graphdef, params = functional.split(model.cast())
    tokens_BS = np.zeros((places, padded), np.int32)
    lengths, row_seeds = np.ones(places, np.int32), np.zeros(places, np.uint32)
    row_seeds[:rows] = range(rows) if seeds is None else seeds
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    state_LD = jnp.asarray(initializers.fixed_state(0, room, config.model.width), config.model.dtype)
    inputs = Inputs(jnp.asarray(lengths), jnp.asarray(row_seeds), jnp.arange(places) < rows, state_LD)
    tokens_BS = jnp.asarray(tokens_BS)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, REPLICATED))
        inputs = jax.device_put(inputs, Inputs._make(NamedSharding(mesh, spec) for spec in INPUT_SPECS))
        tokens_BS = jax.device_put(tokens_BS, NamedSharding(mesh, BY_ROW))

    clock = _Clock()
    program = compiled(prefill, graphdef, rules, params, inputs, tokens_BS)
    compiling = clock.lap()
    carry, prompt_used_B, prompt_computed_B = jax.block_until_ready(program(params, inputs, tokens_BS))
    prefilling = clock.lap()
    program = compiled(decode, graphdef, rules, params, inputs, carry, np.int32(0))
    compiling += clock.lap()

    made, interrupted = jax.device_get(carry.made), False
    sent, ends, stopped = np.zeros(rows, int), np.full(rows, max_new_tokens), np.zeros(places, bool)
    try:
        while True:
            if on_tokens is not None:
                counts = np.minimum(_counts(made, lengths[:rows], most, rules), ends)
                for row in np.flatnonzero(counts > sent):
                    kept = on_tokens(int(row), made.tokens_BN[row, sent[row] : counts[row]].tolist())
                    if kept is not None:
                        ends[row], stopped[row] = sent[row] + kept, True
                sent = counts
                if (stopped & ~made.finished_B).any():
                    made = made._replace(finished_B=made.finished_B | stopped)
                    finished_B = jax.device_put(made.finished_B, carry.made.finished_B.sharding)
                    carry = carry._replace(made=carry.made._replace(finished_B=finished_B))
            before = int(made.number_B.max())
            if before >= max_new_tokens or made.finished_B.all():
                break
            until = max_new_tokens if on_tokens is None else min(before + tokens_per_call, max_new_tokens)
            carry = program(params, inputs, carry, np.int32(until))
            made = jax.device_get(carry.made)
    except KeyboardInterrupt:
        interrupted = True
    decoding = clock.lap()

    results = []
    for row, count in enumerate(np.minimum(_counts(made, lengths[:rows], most, rules), ends)):
        tokens = made.tokens_BN[row, :count].tolist()
        if stopped[row]:
            reason = "stop"
        elif tokens and tokens[-1] in rules.stop_tokens:
            reason = "eos"
        elif count == max_new_tokens:
            reason = "length"
        else:
            reason = "interrupted" if interrupted and not made.finished_B[row] else "context"
        steps, logprobs = made.steps_BN[row, :count].tolist(), made.logprobs_BN[row, :count].tolist()
        results.append(Generated(list(prompts[row]), tokens, steps, logprobs, reason))
    used, computed, prompt_used, prompt_computed = (
        int(np.sum(each[:rows])) for each in (made.used_B, made.computed_B, prompt_used_B, prompt_computed_B)
    )
    return results, Totals(
        rows, sum(len(result.tokens) for result in results), used, computed, prompt_used, prompt_computed,
        size * max(len(devices), 1), compiling, prefilling, decoding,
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


def _counts(made: Any, lengths: np.ndarray, most: int, rules: Rules) -> list[int]:
    """Tokens of each row so far: up to its stop token or the end of the context."""
    counts = []
    for row, length in enumerate(lengths):
        count = min(int(made.number_B[row]), most - int(length))
        ends = np.flatnonzero(np.isin(made.tokens_BN[row, :count], rules.stop_tokens))
        counts.append(int(ends[0]) + 1 if ends.size else count)
    return counts


class _Clock:
    """Time since it was read last."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before
