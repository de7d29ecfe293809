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
from jax.sharding import NamedSharding

from jax_huginn.config.checks import require
from jax_huginn.inference import cache as caches
from jax_huginn.inference.batching import Schedule
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.programs import BY_ROW, DATA, INPUT_SPECS, Inputs, Rules, compiled, decode, mesh_of, prefill
from jax_huginn.inference.sampling import Sampling
from jax_huginn.inference.speculation import Drafts, require_exact
from jax_huginn.inference.thinking import Depth
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.model.sharding import shardings

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
    """Row-recurrences that were computed for them, waiting and finished rows included."""
    core_runs: int
    """Runs of the core for them, each for all rows of a device or `Schedule.width` of them; of all devices."""
    readouts: int
    """Runs of coda and head, beside those that a criterion on predictions makes."""
    drafted: int
    accepted: int
    """Drafts that became text."""
    prompt_used: int
    prompt_computed: int
    """The same of the prompts' tokens, padding included."""
    cache_bytes: int
    compile_seconds: float
    prompt_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the decoding loop, so without each row's first token, which comes from the prompt's logits."""
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
    schedule: Schedule = Schedule(),  # noqa: B008 - immutable
    drafts: Drafts | None = None,
    limits: np.ndarray | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: Callable[[int, list[int]], int | None] | None = None,
    tokens_per_call: int = 16,
    memory_limit: int | None = None,
    devices: Sequence[Any] = (),
    fsdp: int = 1,
) -> tuple[list[Generated], Totals]:
    """Continue every prompt, all in one batch, in which each row thinks at its own pace.

    Args:
        prompts: token ids, at least one a row.
        recurrence: recurrences of a token, or the most of them with `exit`; default: `recurrence.mean` of the config.
        policy: of the cache, see `inference.cache`; `budget` is the number of slots for "mod".
        warm_start: a new token starts from the last state of the token before it, not from the fixed s_0.
        schedule: which rows think together; changes no text.
        drafts: tokens are drafted at few recurrences and verified at all; changes no text, see `inference.speculation`.
        limits: int (rows, max_new_tokens): the most recurrences of the position that gives each token, where it is less
            than `recurrence`. The first column is not read: prompts have no limits.
        seeds: one a row; default: 0, 1, ... A row's text depends on its own seed alone.
        stop_tokens: tokens that end a row, such as the tokenizer's EOS.
        on_tokens: called as (row, new tokens) every `tokens_per_call` tokens of the fastest row; a number ends the row
            after that many of them. Ctrl-C then ends all rows, and what was made is returned.
        memory_limit: bytes that the cache may take on a device; default: what the device has free.
        devices: rows are spread over groups of `fsdp` of them; default: the one that holds the model.
        fsdp: each device of a group holds a part of the weights, and the whole cache of the group's rows.

    Raises:
        UserError: a prompt that is empty, too long or not of this vocabulary, a cache that does not fit, or drafts with
            options under which they would change the text.
    """
    config, rows = model.config, len(prompts)
    most = config.model.max_length
    recurrence = config.recurrence.mean if recurrence is None else recurrence
    require(recurrence > 0, f"recurrence={recurrence} must be positive")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens} must be positive")
    _require_prompts(model, prompts)
    if limits is not None:
        _require_limits(limits, (rows, max_new_tokens), recurrence)
    if drafts is not None:
        require_exact(drafts, recurrence, exit, policy, warm_start)
        require(limits is None, "speculation needs a fixed depth: leave out limits, or the drafts")
    mesh = mesh_of(config, devices, fsdp)
    groups = 1 if mesh is None else mesh.shape[DATA]
    share = -(-rows // groups)
    places = share * groups
    padded = min(-(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, most)
    room = min(padded + max_new_tokens, most)
    slots = caches.slots_of(policy, budget, recurrence)
    size = caches.require_room(config, share, room, slots, memory_limit)

    rules = Rules(
        Depth(recurrence, exit, slots), schedule.of(share), drafts, sampling or Sampling(), tuple(stop_tokens),
        warm_start, max_new_tokens, mesh,
    )  # fmt: skip
    graphdef, params = functional.split(model.cast())
    tokens_BS = np.zeros((places, padded), np.int32)
    lengths, row_seeds = np.ones(places, np.int32), np.zeros(places, np.uint32)
    row_seeds[:rows] = range(rows) if seeds is None else seeds
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    state_LD = jnp.asarray(initializers.fixed_state(0, room, config.model.width), config.model.dtype)
    limit_BN = np.ones((places, 0 if limits is None else max_new_tokens), np.int32)
    limit_BN[:rows] = [] if limits is None else limits
    real_B = jnp.arange(places) < rows
    inputs = Inputs(jnp.asarray(lengths), jnp.asarray(row_seeds), real_B, state_LD, jnp.asarray(limit_BN))
    tokens_BS = jnp.asarray(tokens_BS)
    if mesh is not None:
        params = jax.device_put(params, shardings(params, mesh))
        inputs = jax.device_put(inputs, Inputs._make(NamedSharding(mesh, spec) for spec in INPUT_SPECS))
        tokens_BS = jax.device_put(tokens_BS, NamedSharding(mesh, BY_ROW))

    clock = _Clock()
    prompts_alone = rules._replace(schedule=Schedule(), drafts=None)
    program = compiled(prefill, graphdef, prompts_alone, params, inputs, tokens_BS)
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
                counts = np.minimum(made.number_B[:rows], ends)
                for row in np.flatnonzero(counts > sent):
                    kept = on_tokens(int(row), made.tokens_BN[row, sent[row] : counts[row]].tolist())
                    if kept is not None:
                        ends[row], stopped[row] = sent[row] + kept, True
                sent = counts
                if (stopped & ~made.finished_B).any():
                    made = made._replace(finished_B=made.finished_B | stopped)
                    finished_B = jax.device_put(made.finished_B, carry.made.finished_B.sharding)
                    carry = carry._replace(made=carry.made._replace(finished_B=finished_B))
            if made.finished_B.all():
                break
            fastest = int(made.number_B[~made.finished_B].max())
            until = max_new_tokens if on_tokens is None else fastest + tokens_per_call
            carry = program(params, inputs, carry, np.int32(until))
            made = jax.device_get(carry.made)
    except KeyboardInterrupt:
        interrupted = True
    decoding = clock.lap()

    results = []
    for row, count in enumerate(np.minimum(made.number_B[:rows], ends)):
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
        rows=rows,
        tokens=sum(len(result.tokens) for result in results),
        used=used,
        computed=computed,
        core_runs=int(made.core_runs_1.sum()),
        readouts=int(made.readouts_1.sum()),
        drafted=int(made.drafted_B[:rows].sum()),
        accepted=int(made.accepted_B[:rows].sum()),
        prompt_used=prompt_used,
        prompt_computed=prompt_computed,
        cache_bytes=size * groups * fsdp,
        compile_seconds=compiling,
        prompt_seconds=prefilling,
        decode_seconds=decoding,
    )


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


def _require_limits(limits: np.ndarray, shape: tuple[int, int], recurrence: int) -> None:
    require(limits.shape == shape, f"limits has the shape {limits.shape}, not {shape} as rows and max_new_tokens")
    low, high = limits.min(), limits.max()
    require(low > 0 and high <= recurrence, f"limits from {low} to {high} must lie in [1, recurrence={recurrence}]")


class _Clock:
    """Time since it was read last."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before
