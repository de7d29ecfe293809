"""One optimiser step: micro-batches, gradients, update. Pure functions under `jax.jit`.

Shapes: N micro-batches, B sequences of a micro-batch, S sequence, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.model.huginn import HuginnOutput, MoEHuginnModel, abstract_model, cast_params
from jax_huginn.model.moe import Routing
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


def make_gradient(config: Config) -> Callable[..., tuple[tuple[jax.Array, HuginnOutput], Any]]:
    """`gradient(params, tokens_BS, labels_BS, n, k, index) -> (loss, output), gradients` of one micro-batch.

    `params` are in the compute type (`cast_params`), `index` numbers the micro-batch since the start of the run: s_0 is
    drawn from it and the seed at the micro-batch's global shape. One compilation serves every depth. Of the gradient it
    holds two versions, unless `model.remat` is full: the usual k is static, so that its residuals need no stacked
    buffers and the sums of weight gradients no pass of their own; the rarer k are a loop (docs/performance.md).
    """
    graphdef, _ = abstract_model(config)
    state_key = jax.random.key(config.train.seed)
    usual_k = min(config.recurrence.mean, config.recurrence.backprop_depth)

    def loss(params: Any, tokens_BS, labels_BS, n, k, index) -> tuple[jax.Array, HuginnOutput]:
        shape = (*tokens_BS.shape, config.model.width)
        key = jax.random.fold_in(state_key, index)
        initial_state = initializers.random_state(key, shape, jnp.dtype(config.model.dtype))
        output = nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, n, k, initial_state)
        assert output.loss is not None
        return output.loss, dataclasses.replace(output, latents=jnp.zeros(()))  # too large to keep

    looped = jax.value_and_grad(loss, has_aux=True)

    def straight(params, tokens_BS, labels_BS, n, k, index):
        return jax.value_and_grad(loss, has_aux=True)(params, tokens_BS, labels_BS, n, usual_k, index)

    def gradient(params, tokens_BS, labels_BS, n, k, index):
        inputs = (params, tokens_BS, labels_BS, n, k, index)
        return looped(*inputs) if config.model.remat == "full" else lax.cond(k == usual_k, straight, looped, *inputs)

    return gradient


def make_train_step(config: Config) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens_BS, labels_BS, n_N, k_N) -> state, metrics`; to be jitted with the state donated.

    The batch is the whole step's; it is cut into `train.micro_batches` parts in order, each with its own depth
    (`sample_depths`) and its own s_0. Gradients are taken with respect to the weights in `model.dtype`. The losses of
    micro-batches are averaged.
    """
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    micro_batches = config.train.micro_batches
    gradient = make_gradient(config)

    def step(state: TrainState, tokens_BS: jax.Array, labels_BS: jax.Array, n_N: jax.Array, k_N: jax.Array):
        params = cast_params(state.params, config.model.dtype)
        index_N = state.step * micro_batches + jnp.arange(micro_batches, dtype=jnp.int32)
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (tokens_BS, labels_BS))
        inputs = (*parts, n_N, k_N, index_N)

        def micro_step(total, inputs):
            (_, output), grads = gradient(params, *inputs)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads), output

        if micro_batches == 1:  # no second set of gradients in memory
            (_, output), grads = gradient(params, *jax.tree.map(lambda x: x[0], inputs))
            outputs = jax.tree.map(lambda x: x[None], output)
        else:
            grads, outputs = lax.scan(micro_step, jax.tree.map(jnp.zeros_like, state.params), inputs)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype) / micro_batches, grads, state.params)

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
        return TrainState(new_params, opt_state, state.step + 1), metrics

    return step
