"""One optimiser step: micro-batches, gradients, update. Pure functions under `jax.jit`.

Shapes: N micro-batches, B sequences of a micro-batch, S sequence, D width. Loss and gradient are the program of one
device of the mesh, whose B are its own; the update is left to the compiler, which sees how everything is split.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_huginn.config.schema import Config
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel, TrainingLoss, abstract_model
from jax_huginn.model.moe import Routing
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.sharding import shardings, specs, summed_gradients
from jax_huginn.parallel.mesh import (
    AXES,
    REPLICATED,
    batch_sum,
    device_count,
    device_index,
    make_mesh,
    per_device,
)
from jax_huginn.training.optimizer import make_optimizer, make_schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an optimiser step changes."""

    params: Any
    """Master weights in `model.param_dtype`."""
    opt_state: Any
    step: jax.Array
    """Optimiser steps done, int32; those whose update was skipped count too, since data and depths went on."""
    skipped: jax.Array
    """Steps whose update was skipped, int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Scalars of one step, averaged over its micro-batches (N)."""

    loss: jax.Array
    """log_ppl, nats per token."""
    objective: jax.Array
    """The loss with its auxiliaries: what is minimised."""
    grad_norm: jax.Array
    """Global norm before clipping."""
    param_norm: jax.Array
    learning_rate: jax.Array
    finite_N: jax.Array
    """Whether a micro-batch had a finite loss and a finite gradient, bool."""
    skipped: jax.Array
    """Updates skipped so far, this one included."""
    moe: Routing | None
    recurrence: dict[str, jax.Array]


def init_params(config: Config) -> Any:
    return functional.params_of(MoEHuginnModel(config))


def init_state(config: Config) -> TrainState:
    """Step 0: fresh weights from `train.seed` and an empty optimiser. Traceable, so `jax.eval_shape` works too."""
    params = init_params(config)
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of `make_state`'s arrays."""
    abstract = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        shardings(abstract, mesh),
    )


def make_state(config: Config, mesh: Mesh) -> TrainState:
    """`init_state` on a mesh: each device draws its own shard, and none ever holds the whole."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: init_state(config), out_shardings=where)()


def make_gradient(config: Config) -> Callable[..., tuple[Any, TrainingLoss, jax.Array]]:
    """`gradient(params, tokens_NBS, labels_NBS, n_N, k_N, index_N) -> gradients, outputs, finite_N` of one device.

    Parameters are this device's parts, in `model.dtype`, and so are the gradients, in at least float32, added up over
    the micro-batches and the devices. The outputs are stacked over the micro-batches and equal on all devices;
    `finite_N` says which of these have a finite loss and, where they are several, a finite gradient. Each
    micro-batch has its own s_0, drawn from (seed, its number, row) for this device's rows.

    One compilation serves every depth. Unless `compute.remat` is full, the program contains two gradient paths: an
    unrolled one for the usual k, whose residuals need no stacked buffers, and a loop for the rarer smaller k
    (docs/performance.md).
    """
    graphdef, _ = abstract_model(config)
    micro_batches = config.train.micro_batches
    state_key = jax.random.key(config.train.seed)
    usual_k = config.recurrence.gradient_steps

    def loss(params: Any, tokens_BS, labels_BS, n, k, index) -> tuple[jax.Array, TrainingLoss]:
        shape = (*tokens_BS.shape, config.model.width)
        key = jax.random.fold_in(state_key, index)
        first_row = device_index() * tokens_BS.shape[0]
        initial_state = initializers.random_state(key, shape, jnp.dtype(config.model.dtype), first_row)
        output = nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, n, k, initial_state)
        # All devices differentiate the one loss of the batch together, so each answers for its share of it.
        return output.loss / device_count(), output

    differentiate = jax.grad(loss, has_aux=True)  # a traced k is a loop, a static one straight

    def straight(params, tokens_BS, labels_BS, n, k, index):
        return differentiate(params, tokens_BS, labels_BS, n, usual_k, index)

    def gradient(*inputs):
        if config.compute.remat == "full":
            return differentiate(*inputs)
        *_, k, _ = inputs
        return lax.cond(k == usual_k, straight, differentiate, *inputs)

    def run(params: Any, *inputs_N) -> tuple[Any, TrainingLoss, jax.Array]:
        if micro_batches == 1:  # no second set of gradients in memory, and their norm is taken by the step
            gradients, output = gradient(params, *jax.tree.map(lambda x: x[0], inputs_N))
            outputs = jax.tree.map(lambda x: x[None], output)
            finite_N = jnp.isfinite(outputs.loss)
        else:

            def micro_step(total, inputs):
                gradients, output = gradient(params, *inputs)
                bad = ~jnp.isfinite(optax.global_norm(gradients))  # a norm is finite where all its elements are
                finite = jnp.isfinite(output.loss) & (batch_sum(bad.astype(jnp.int32)) == 0)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients), (output, finite)

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, config.model.param_dtype), params)
            gradients, (outputs, finite_N) = lax.scan(micro_step, zeros, inputs_N)
        gradients = jax.tree.map(lambda g: g.astype(config.model.param_dtype), gradients)
        return summed_gradients(gradients), outputs, finite_N

    return run


def make_train_step(config: Config, mesh: Mesh | None = None) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens_BS, labels_BS, n_N, k_N) -> state, metrics`; to be jitted with the state donated.

    The batch is the whole step's; it is cut into `train.micro_batches` parts in order, each with its own depth
    (`sample_depths`). Gradients are taken with respect to the weights in `model.dtype`. The losses of micro-batches are
    averaged. Without a mesh the step is one device's.

    Where a loss or a gradient is not finite, the update is skipped: weights and optimiser, its schedule's count
    included, stay as they were bit for bit.
    """
    mesh = mesh or make_mesh(config, jax.devices()[:1])
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    micro_batches = config.train.micro_batches
    in_order = PartitionSpec(None, AXES)  # every micro-batch is split over all devices

    def step(state: TrainState, tokens_BS: jax.Array, labels_BS: jax.Array, n_N: jax.Array, k_N: jax.Array):
        params = cast_params(state.params, config.model.dtype)
        split = specs(params)
        gradient = per_device(
            make_gradient(config),
            mesh,
            in_specs=(split, in_order, in_order, REPLICATED, REPLICATED, REPLICATED),
            out_specs=(split, REPLICATED, REPLICATED),
        )
        index_N = state.step * micro_batches + jnp.arange(micro_batches, dtype=jnp.int32)
        parts = (x.reshape(micro_batches, -1, *x.shape[1:]) for x in (tokens_BS, labels_BS))
        grads, outputs, finite_N = gradient(params, *parts, n_N, k_N, index_N)
        grads = jax.tree.map(lambda g: g / micro_batches, grads)
        grad_norm = optax.global_norm(grads)
        good = finite_N.all() & jnp.isfinite(grad_norm)
        finite_N = good[None] if micro_batches == 1 else finite_N

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_params = optax.apply_updates(state.params, updates)
            # A choice per element fuses into the update, which reads the old value anyway: no time, no second state.
            # `lax.cond` would stand between the update and the donated buffers.
            new_params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), (new_params, opt_state), (state.params, state.opt_state)
            )
        skipped = state.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        metrics = StepMetrics(
            loss=outputs.log_ppl.mean(),
            objective=outputs.loss.mean(),
            grad_norm=grad_norm,
            param_norm=optax.global_norm(new_params),
            learning_rate=schedule(state.step - state.skipped),
            finite_N=finite_N,
            skipped=skipped,
            moe=None if outputs.moe is None else Routing.total(outputs.moe),
            recurrence=jax.tree.map(lambda x: x.mean(axis=0), outputs.recurrence),
        )
        new_state = TrainState(new_params, opt_state, state.step + 1, skipped)
        return jax.lax.with_sharding_constraint(
            (new_state, metrics),
            (shardings(new_state, mesh), jax.tree.map(lambda _: NamedSharding(mesh, REPLICATED), metrics)),
        )

    return step
