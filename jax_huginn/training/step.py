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
    return nnx.as_pure(nnx.split(MoEHuginnModel(config))[1])


def init_state(config: Config) -> TrainState:
    """Step 0: fresh weights from `train.seed` and an empty optimiser. Traceable, so `jax.eval_shape` works too."""
    params = init_params(config)
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def make_train_step(config: Config) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens_BS, labels_BS, n_N, k_N) -> state, metrics`; to be jitted with the state donated.

    The batch is the whole step's; it is cut into `train.micro_batches` parts in order, each with its own depth
    (`sample_depths`) and its own s_0, drawn from (seed, micro-batch number) at the micro-batch's global shape.
    Gradients are taken with respect to the weights in `model.dtype`. The losses of micro-batches are averaged.

    Where a loss or a gradient is not finite, the update is skipped: weights and optimiser, its schedule's count
    included, stay as they were bit for bit.
    """
    graphdef, _ = abstract_model(config)
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    micro_batches = config.train.micro_batches
    state_key = jax.random.key(config.train.seed)

    def loss(params: Any, tokens_BS, labels_BS, n, k, index) -> tuple[jax.Array, HuginnOutput]:
        shape = (*tokens_BS.shape, config.model.width)
        key = jax.random.fold_in(state_key, index)
        initial_state = initializers.random_state(key, shape, jnp.dtype(config.model.dtype))
        output = nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, n, k, initial_state)
        assert output.loss is not None
        return output.loss, dataclasses.replace(output, latents=jnp.zeros(()))  # too large to keep

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, tokens_BS: jax.Array, labels_BS: jax.Array, n_N: jax.Array, k_N: jax.Array):
        params = cast_params(state.params, config.model.dtype)
        index_N = state.step * micro_batches + jnp.arange(micro_batches, dtype=jnp.int32)
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (tokens_BS, labels_BS))
        inputs = (*parts, n_N, k_N, index_N)

        def micro_step(total, inputs):
            (_, output), grads = gradient(params, *inputs)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads)
            return total, (output, optax.global_norm(grads))

        if micro_batches == 1:  # no second set of gradients in memory
            (_, output), grads = gradient(params, *jax.tree.map(lambda x: x[0], inputs))
            outputs, norm_N = jax.tree.map(lambda x: x[None], (output, optax.global_norm(grads)))
        else:
            grads, (outputs, norm_N) = lax.scan(micro_step, jax.tree.map(jnp.zeros_like, state.params), inputs)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype) / micro_batches, grads, state.params)
        grad_norm = optax.global_norm(grads)
        finite_N = jnp.isfinite(outputs.loss) & jnp.isfinite(norm_N)  # a norm is finite where all its elements are
        good = finite_N.all() & jnp.isfinite(grad_norm)

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
            moe=None if outputs.moe is None else Routing.total(outputs.moe, micro_batches),
            recurrence=jax.tree.map(lambda x: x.mean(axis=0), outputs.recurrence),
        )
        return TrainState(new_params, opt_state, state.step + 1, skipped), metrics

    return step
