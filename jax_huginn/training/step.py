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
from jax_huginn.model import initializers
from jax_huginn.model.huginn import HuginnOutput, MoEHuginnModel, abstract_model, cast_params
from jax_huginn.model.moe import Routing
from jax_huginn.parallel.mesh import (
    AXES,
    REPLICATED,
    device_count,
    device_index,
    make_mesh,
    per_device,
    shardings,
    specs,
    summed_gradients,
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
    """Optimiser steps done, int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Scalars of one step, averaged over its micro-batches."""

    loss: jax.Array
    """log_ppl, nats per token."""
    objective: jax.Array
    """The loss with its auxiliaries: what is minimised."""
    grad_norm: jax.Array
    """Global norm before clipping."""
    param_norm: jax.Array
    learning_rate: jax.Array
    moe: Routing | None
    recurrence: dict[str, jax.Array]


def init_params(config: Config) -> Any:
    return nnx.as_pure(nnx.split(MoEHuginnModel(config))[1])


def init_state(config: Config) -> TrainState:
    """Step 0: fresh weights from `train.seed` and an empty optimiser. Traceable, so `jax.eval_shape` works too."""
    params = init_params(config)
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def make_state(config: Config, mesh: Mesh) -> TrainState:
    """`init_state` on a mesh: every device draws its part, none ever holds the whole."""
    abstract = jax.eval_shape(lambda: init_state(config))
    return jax.jit(lambda: init_state(config), out_shardings=shardings(abstract, mesh))()


def make_gradient(config: Config) -> Callable[..., tuple[Any, HuginnOutput]]:
    """`gradient(params, tokens_NBS, labels_NBS, n_N, k_N, index_N) -> gradients, outputs` as one device runs it.

    Parameters are this device's parts, in `model.dtype`, and so are the gradients, in at least float32, added up over
    the micro-batches and the devices. The outputs are stacked over the micro-batches and equal on all devices. Each
    micro-batch has its own s_0, drawn from (seed, its number, row) for this device's rows.

    One compilation serves every depth. Of a micro-batch's gradient it holds two versions, unless `model.remat` is full:
    the usual k is static, so that its residuals need no stacked buffers and the sums of weight gradients no pass of
    their own; the rarer k are a loop (docs/performance.md).
    """
    graphdef, _ = abstract_model(config)
    micro_batches = config.train.micro_batches
    state_key = jax.random.key(config.train.seed)
    usual_k = min(config.recurrence.mean, config.recurrence.backprop_depth)

    def loss(params: Any, tokens_BS, labels_BS, n, k, index) -> tuple[jax.Array, HuginnOutput]:
        shape = (*tokens_BS.shape, config.model.width)
        key = jax.random.fold_in(state_key, index)
        first_row = device_index() * tokens_BS.shape[0]
        initial_state = initializers.random_state(key, shape, jnp.dtype(config.model.dtype), first_row)
        output = nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, n, k, initial_state)
        assert output.loss is not None
        output = dataclasses.replace(output, latents=jnp.zeros(()))  # too large to keep
        # All devices differentiate the one loss of the batch together, so each answers for its share of it.
        return output.loss / device_count(), output

    looped = jax.grad(loss, has_aux=True)
    usual_k = min(config.recurrence.mean, config.recurrence.backprop_depth)

    def straight(params, tokens_BS, labels_BS, n, k, index):
        return jax.grad(loss, has_aux=True)(params, tokens_BS, labels_BS, n, usual_k, index)

    def gradient(params, tokens_BS, labels_BS, n, k, index):
        inputs = (params, tokens_BS, labels_BS, n, k, index)
        return looped(*inputs) if config.model.remat == "full" else lax.cond(k == usual_k, straight, looped, *inputs)

    def run(params: Any, *inputs_N) -> tuple[Any, HuginnOutput]:
        if micro_batches == 1:  # no second set of gradients in memory
            gradients, output = gradient(params, *jax.tree.map(lambda x: x[0], inputs_N))
            outputs = jax.tree.map(lambda x: x[None], output)
        else:

            def micro_step(total, inputs):
                gradients, output = gradient(params, *inputs)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients), output

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, config.model.param_dtype), params)
            gradients, outputs = lax.scan(micro_step, zeros, inputs_N)
        gradients = jax.tree.map(lambda g: g.astype(config.model.param_dtype), gradients)
        return summed_gradients(gradients), outputs

    return run


def make_train_step(config: Config, mesh: Mesh | None = None) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens_BS, labels_BS, n_N, k_N) -> state, metrics`; to be jitted with the state donated.

    The batch is the whole step's; it is cut into `train.micro_batches` parts in order, each with its own depth
    (`sample_depths`). Gradients are taken with respect to the weights in `model.dtype`. The losses of micro-batches are
    averaged. Without a mesh the step is one device's.
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
            out_specs=(split, REPLICATED),
        )
        index_N = state.step * micro_batches + jnp.arange(micro_batches, dtype=jnp.int32)
        parts = (x.reshape(micro_batches, -1, *x.shape[1:]) for x in (tokens_BS, labels_BS))
        grads, outputs = gradient(params, *parts, n_N, k_N, index_N)
        grads = jax.tree.map(lambda g: g / micro_batches, grads)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(
            loss=outputs.log_ppl.mean(),
            objective=outputs.loss.mean(),
            grad_norm=optax.global_norm(grads),
            param_norm=optax.global_norm(new_params),
            learning_rate=schedule(state.step),
            moe=None if outputs.moe is None else Routing.total(outputs.moe),
            recurrence=jax.tree.map(lambda x: x.mean(axis=0), outputs.recurrence),
        )
        new_state = TrainState(new_params, opt_state, state.step + 1)
        return jax.lax.with_sharding_constraint(
            (new_state, metrics),
            (shardings(new_state, mesh), jax.tree.map(lambda _: NamedSharding(mesh, REPLICATED), metrics)),
        )

    return step
