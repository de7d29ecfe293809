"""The two compiled programs of generation: one for the prompts with the first new token, one loop for all further ones.

With a mesh each group of devices along its axis `data` runs a program of its own on its share of the rows, without any
traffic between groups; one whose rows have finished does not wait for the others. Within a group every device holds a
part of the weights, along their width, and XLA's partitioner splits the matmuls and adds up what they give.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_huginn.config.checks import require
from jax_huginn.config.schema import Config
from jax_huginn.inference import batching, speculation
from jax_huginn.inference.batching import InFlight, Schedule
from jax_huginn.inference.sampling import Sampling, choose
from jax_huginn.inference.speculation import Drafts
from jax_huginn.inference.thinking import Depth, think_prompts
from jax_huginn.model.cache import Cache
from jax_huginn.parallel.mesh import AXES, REPLICATED

DATA = AXES[0]
BY_ROW = PartitionSpec(DATA)
# XLA's Triton matmuls copy a weight whose rows they split unevenly, in every recurrence; cuBLAS does not. Of the 3.5 B
# shape on an H200, batch 8 at context 256, decoding runs at 233 tokens/s without and at 208 with them.
OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


class Rules(NamedTuple):
    """What the compiled programs depend on beside the model."""

    depth: Depth
    schedule: Schedule
    drafts: Drafts | None
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    warm_start: bool
    max_new_tokens: int
    mesh: Mesh | None
    """Of the axes `parallel.mesh.AXES`; None is one device."""


class Inputs(NamedTuple):
    """What stays the same from token to token."""

    length_B: jax.Array
    seed_B: jax.Array
    real_B: jax.Array
    """False for rows that only fill up a device's share."""
    state_LD: jax.Array
    """s_0 of every position of the cache."""
    limit_BN: jax.Array
    """The most recurrences of the position that gives each token, or (B,0)."""


class Made(NamedTuple):
    """The text so far, small enough to be fetched often."""

    number_B: jax.Array
    """Tokens made."""
    finished_B: jax.Array
    tokens_BN: jax.Array
    steps_BN: jax.Array
    logprobs_BN: jax.Array
    used_B: jax.Array
    computed_B: jax.Array
    core_runs_1: jax.Array
    """Runs of the core on a device."""
    readouts_1: jax.Array
    """Runs of coda and head beside those of a criterion."""
    drafted_B: jax.Array
    accepted_B: jax.Array
    """Drafts that became text."""


class Carry(NamedTuple):
    """Everything that changes from round to round."""

    made: Made
    cache: Cache
    token_B: jax.Array
    """The newest token of every row, which is not in the cache yet."""
    in_flight: InFlight
    seen_BV: jax.Array
    """Tokens of prompt and text, for the repetition penalty; (B,0) without one."""


INPUT_SPECS: Any = Inputs._make([BY_ROW, BY_ROW, BY_ROW, REPLICATED, BY_ROW])
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
        none_B = jnp.zeros(rows, jnp.int32)
        nothing = Made(
            number_B=none_B,
            finished_B=~inputs.real_B,
            tokens_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
            steps_BN=jnp.zeros((rows, rules.max_new_tokens), jnp.int32),
            logprobs_BN=jnp.zeros((rows, rules.max_new_tokens), thought.logits_BV.dtype),
            used_B=none_B,
            computed_B=none_B,
            core_runs_1=none_B[:1],
            readouts_1=none_B[:1],
            drafted_B=none_B,
            accepted_B=none_B,
        )
        begun = batching.begin(rules.depth.exit, thought.state_B1D, model.config.model.vocab_size)
        carry = Carry(nothing, thought.cache, none_B, begun, seen_BV)
        most = model.config.model.max_length
        carry = _next_token(rules, inputs, most, carry, thought.logits_BV, inputs.real_B, thought.steps_B)
        return carry, thought.used_B, thought.computed_B

    in_specs, out_specs = (REPLICATED, INPUT_SPECS, BY_ROW), (_CARRY_SPECS, BY_ROW, BY_ROW)
    return _in_each_group(run, rules.mesh, in_specs, out_specs)(params, inputs, tokens_BS)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(graphdef: nnx.GraphDef, rules: Rules, params: Any, inputs: Inputs, carry: Carry, until: jax.Array):
    """The carry when an unfinished row has `until` tokens or all rows have finished."""

    def run(params: Any, inputs: Inputs, carry: Carry, until: jax.Array) -> Carry:
        model = nnx.merge(graphdef, params)
        limited = inputs.limit_BN.shape[1] > 0

        def one_round(carry: Carry) -> Carry:
            made, rows = carry.made, carry.in_flight
            index_B = inputs.length_B + made.number_B - 1
            start_B1D = rows.state_B1D if rules.warm_start else inputs.state_LD.at[index_B].get(mode="clip")[:, None]
            limit_B = None
            if limited:
                limit_B = jnp.take_along_axis(inputs.limit_BN, made.number_B[:, None], axis=1, mode="clip")[:, 0]
            done = batching.think_a_round(
                model, rules.depth, rules.schedule, rows, carry.cache, carry.token_B, index_B, made.finished_B,
                made.number_B, start_B1D, limit_B,
            )  # fmt: skip
            steps_B = done.in_flight.step_B1[:, 0]
            made = made._replace(
                used_B=made.used_B + jnp.where(done.ready_B, steps_B, 0),
                computed_B=made.computed_B + done.computed_B,
                core_runs_1=made.core_runs_1 + done.core_runs,
                readouts_1=made.readouts_1 + 1,
            )
            carry = carry._replace(made=made, cache=done.cache, in_flight=done.in_flight)
            most = model.config.model.max_length
            return _next_token(rules, inputs, most, carry, done.logits_BV, done.ready_B, steps_B)

        def one_cycle(carry: Carry) -> Carry:
            full_B, most = jnp.full_like(carry.made.number_B, rules.depth.most), model.config.model.max_length

            def append(carry: Carry, logits_BV: jax.Array, ready_B: jax.Array) -> Carry:
                return _next_token(rules, inputs, most, carry, logits_BV, ready_B, full_B)

            assert rules.drafts is not None
            return speculation.cycle(
                model, rules.drafts, rules.depth.most, inputs.length_B, inputs.state_LD, carry, append
            )

        def unfinished(carry: Carry) -> jax.Array:
            made = carry.made
            return (~made.finished_B).any() & (jnp.max(jnp.where(made.finished_B, 0, made.number_B)) < until)

        return lax.while_loop(unfinished, one_round if rules.drafts is None else one_cycle, carry)

    in_specs = (REPLICATED, INPUT_SPECS, _CARRY_SPECS, REPLICATED)
    return _in_each_group(run, rules.mesh, in_specs, _CARRY_SPECS)(params, inputs, carry, until)


def _next_token(
    rules: Rules,
    inputs: Inputs,
    most: int,
    carry: Carry,
    logits_BV: jax.Array,
    ready_B: jax.Array,
    steps_B: jax.Array,
) -> Carry:
    """The carry with one more token in the rows that are ready; `most` is the context's length."""
    made, rows_B = carry.made, jnp.arange(ready_B.shape[0])
    token_B, logprob_B = choose(rules.sampling, logits_BV, carry.seen_BV, inputs.seed_B, made.number_B)
    number_B = made.number_B + 1
    ends_B = (inputs.length_B + number_B >= most) | (number_B >= rules.max_new_tokens)
    for stop in rules.stop_tokens:
        ends_B |= token_B == stop

    def appended(each_BN: jax.Array, new_B: jax.Array) -> jax.Array:
        place_B = jnp.where(ready_B, made.number_B, rules.max_new_tokens)
        return each_BN.at[rows_B, place_B].set(new_B, mode="drop")

    made = made._replace(
        number_B=jnp.where(ready_B, number_B, made.number_B),
        finished_B=made.finished_B | (ready_B & ends_B),
        tokens_BN=appended(made.tokens_BN, token_B),
        steps_BN=appended(made.steps_BN, steps_B),
        logprobs_BN=appended(made.logprobs_BN, logprob_B),
    )
    seen_BV = carry.seen_BV.at[rows_B, jnp.where(ready_B, token_B, carry.seen_BV.shape[1])].set(True, mode="drop")
    rows = carry.in_flight
    rows = rows._replace(step_B1=jnp.where(ready_B[:, None], 0, rows.step_B1))
    token_B = jnp.where(ready_B, token_B, carry.token_B)
    return Carry(made, carry.cache, token_B, rows, seen_BV)


def mesh_of(config: Config, devices: Sequence[Any], fsdp: int) -> Mesh | None:
    """Groups of `fsdp` devices, each with a copy of the weights; None for one device.

    Raises:
        UserError: a size that does not fit the devices or the model.
    """
    count, width = max(len(devices), 1), config.model.width
    require(fsdp > 0 and count % fsdp == 0, f"parallel.fsdp={fsdp} does not divide the {count} device(s)")
    require(width % fsdp == 0, f"model.width={width} must be divisible by parallel.fsdp={fsdp}")
    if count == 1:
        return None
    return Mesh(np.array(devices).reshape(-1, fsdp, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _in_each_group(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    if mesh is None:
        return function
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={DATA}, check_vma=False
    )
    # The devices of a group return the same; without this the partitioner chooses, and the next call must take it.
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    return lambda *inputs: lax.with_sharding_constraint(mapped(*inputs), places)


@functools.lru_cache(maxsize=32)
def _compile(function: Any, graphdef: nnx.GraphDef, rules: Rules, structure: Any, leaves: tuple) -> Callable[..., Any]:
    lowered = function.lower(graphdef, rules, *jax.tree.unflatten(structure, leaves))
    return lowered.compile(compiler_options=OPTIONS.get(jax.default_backend()))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
