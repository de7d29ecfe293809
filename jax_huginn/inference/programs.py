"""The two compiled programs of generation: one for the prompts with the first new token, one loop over further tokens.

With a mesh of its one axis `DATA` each device runs the program of one device on its share of the rows, without any
traffic; a device whose rows have finished does not wait for the others.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jax_huginn.inference.sampling import Sampling, choose
from jax_huginn.inference.thinking import Depth, Thought, think_prompts, think_tokens
from jax_huginn.model.cache import Cache
from jax_huginn.parallel.mesh import REPLICATED, per_device

DATA = "data"
BY_ROW = PartitionSpec(DATA)
# XLA's Triton matmuls copy a weight whose rows they split unevenly, in every recurrence; cuBLAS does not. Of the 3.5 B
# shape on an H200, batch 8 at context 256, decoding runs at 233 tokens/s without and at 208 with them.
OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


class Rules(NamedTuple):
    """What the compiled programs depend on beside the model."""

    depth: Depth
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    warm_start: bool
    max_new_tokens: int
    mesh: Mesh | None


class Inputs(NamedTuple):
    """What stays the same from token to token."""

    length_B: jax.Array
    seed_B: jax.Array
    real_B: jax.Array
    """False for rows that only fill up a device's share."""
    state_LD: jax.Array
    """s_0 of every position of the cache."""


class Made(NamedTuple):
    """The text so far, small enough to be fetched often."""

    number_B: jax.Array
    """Tokens made, the same for all rows of a device; what a row made after its end does not count."""
    finished_B: jax.Array
    tokens_BN: jax.Array
    steps_BN: jax.Array
    logprobs_BN: jax.Array
    used_B: jax.Array
    computed_B: jax.Array


class Carry(NamedTuple):
    """Everything that changes from token to token."""

    made: Made
    cache: Cache
    token_B: jax.Array
    """The newest token of every row, which is not in the cache yet."""
    state_B1D: jax.Array
    """The last state of the token before it."""
    seen_BV: jax.Array
    """Tokens of prompt and text, for the repetition penalty; (B,0) without one."""


INPUT_SPECS: Any = Inputs._make([BY_ROW, BY_ROW, BY_ROW, REPLICATED])
_CARRY_SPECS: Any = Carry._make([BY_ROW, PartitionSpec(None, DATA), BY_ROW, BY_ROW, BY_ROW])


def compiled(function: Any, graphdef: nnx.GraphDef, rules: Rules, *inputs: Any) -> Callable[..., Any]:
    """`prefill` or `decode` for inputs of these shapes, compiled before it runs so that its time is known apart."""
    leaves, structure = jax.tree.flatten(jax.tree.map(_shape_of, inputs))
    return _compile(function, graphdef, rules, structure, tuple(leaves))


@partial(jax.jit, static_argnums=(0, 1))
def prefill(graphdef: nnx.GraphDef, rules: Rules, params: Any, inputs: Inputs, tokens_BS: jax.Array):
    """The carry with the first new token; recurrences that each prompt used, and that were computed for it."""

    def run(params: Any, inputs: Inputs, tokens_BS: jax.Array):
        model = nnx.merge(graphdef, params)
        rows, length = tokens_BS.shape
        thought = think_prompts(model, rules.depth, tokens_BS, inputs.length_B, inputs.state_LD)
        seen_BV = jnp.zeros((rows, 0), bool)
        if rules.sampling.repetition_penalty != 1:
            vocabulary = model.config.model.vocab_size
            tokens_BS = jnp.where(jnp.arange(length) < inputs.length_B[:, None], tokens_BS, vocabulary)
            seen_BV = jnp.zeros((rows, vocabulary), bool)
            seen_BV = seen_BV.at[jnp.arange(rows)[:, None], tokens_BS].set(True, mode="drop")
        nothing = Made(
            number_B=jnp.zeros(rows, jnp.int32),
            finished_B=~inputs.real_B,
            tokens_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
            steps_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
            logprobs_BN=jnp.zeros((rows, rules.max_new_tokens), thought.logits_BV.dtype),
            used_B=jnp.zeros(rows, jnp.int32),
            computed_B=jnp.zeros(rows, jnp.int32),
        )
        most = model.config.model.max_length
        return _next_token(rules, inputs, most, nothing, seen_BV, thought), thought.used_B, thought.computed_B

    in_specs, out_specs = (REPLICATED, INPUT_SPECS, BY_ROW), (_CARRY_SPECS, BY_ROW, BY_ROW)
    return _on_each_device(run, rules.mesh, in_specs, out_specs)(params, inputs, tokens_BS)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(graphdef: nnx.GraphDef, rules: Rules, params: Any, inputs: Inputs, carry: Carry, until: jax.Array):
    """The carry when `until` tokens have been made or all rows have finished."""

    def run(params: Any, inputs: Inputs, carry: Carry, until: jax.Array) -> Carry:
        model = nnx.merge(graphdef, params)

        def token(carry: Carry) -> Carry:
            made = carry.made
            index_B = inputs.length_B + made.number_B - 1
            start_B1D = carry.state_B1D if rules.warm_start else inputs.state_LD.at[index_B].get(mode="clip")[:, None]
            thought = think_tokens(model, rules.depth, carry.cache, carry.token_B, index_B, made.finished_B, start_B1D)
            made = made._replace(used_B=made.used_B + thought.used_B, computed_B=made.computed_B + thought.computed_B)
            return _next_token(rules, inputs, model.config.model.max_length, made, carry.seen_BV, thought)

        def unfinished(carry: Carry) -> jax.Array:
            return (carry.made.number_B[0] < until) & ~carry.made.finished_B.all()

        return lax.while_loop(unfinished, token, carry)

    in_specs = (REPLICATED, INPUT_SPECS, _CARRY_SPECS, REPLICATED)
    return _on_each_device(run, rules.mesh, in_specs, _CARRY_SPECS)(params, inputs, carry, until)


def _next_token(rules: Rules, inputs: Inputs, most: int, made: Made, seen_BV: jax.Array, thought: Thought) -> Carry:
    """The carry with one more token, chosen from the logits of a thought; `most` is the context's length."""
    rows_B = jnp.arange(thought.steps_B.shape[0])
    token_B, logprob_B = choose(rules.sampling, thought.logits_BV, seen_BV, inputs.seed_B, made.number_B)
    finished_B = made.finished_B | (inputs.length_B + made.number_B + 1 >= most)
    for stop in rules.stop_tokens:
        finished_B |= token_B == stop
    newest = made.number_B[0]
    made = made._replace(
        number_B=made.number_B + 1,
        finished_B=finished_B,
        tokens_BN=made.tokens_BN.at[:, newest].set(token_B),
        steps_BN=made.steps_BN.at[:, newest].set(thought.steps_B),
        logprobs_BN=made.logprobs_BN.at[:, newest].set(logprob_B),
    )
    seen_BV = seen_BV.at[rows_B, token_B].set(True, mode="drop")
    return Carry(made, thought.cache, token_B, thought.state_B1D, seen_BV)


def _on_each_device(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    return function if mesh is None else per_device(function, mesh, in_specs, out_specs)


@functools.lru_cache(maxsize=32)
def _compile(function: Any, graphdef: nnx.GraphDef, rules: Rules, structure: Any, leaves: tuple) -> Callable[..., Any]:
    lowered = function.lower(graphdef, rules, *jax.tree.unflatten(structure, leaves))
    return lowered.compile(compiler_options=OPTIONS.get(jax.default_backend()))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
