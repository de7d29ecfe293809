"""One optimiser step: micro-batches, gradients, update. Pure functions under `jax.jit`.

Loss and gradient run as the program of one device of the mesh (`mesh.per_device`). The update is partitioned by the
compiler, which knows how every array is sharded. The letters of shapes are those of `jax_huginn.model`.
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
from jax_huginn.model.sharding import shardings, shared, specs, summed_gradients
from jax_huginn.ops.cross_entropy import IGNORE
from jax_huginn.ops.norm import at_least_float32
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
    """Everything an optimiser step changes."""

    params: Any
    """Master weights in `model.param_dtype`."""
    opt_state: Any
    step: jax.Array
    """Number of steps done, int32, skipped ones included: they too consumed data and depths."""
    skipped: jax.Array
    """Number of steps whose update was skipped, int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, averaged over its micro-batches; the loss over the tokens that are learnt."""

    loss: jax.Array
    """log_ppl, nats per token."""
    objective: jax.Array
    """The loss with its auxiliaries, which is what training minimises."""
    grad_norm: jax.Array
    """Global norm before clipping."""
    param_norm: jax.Array
    learning_rate: jax.Array
    finite_U: jax.Array
    """Whether each micro-batch had a finite loss and gradient, bool."""
    skipped: jax.Array
    """Number of updates skipped so far, this step included."""
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
    """`init_state` on a mesh: every device draws its own shard, and none ever holds the whole state."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: init_state(config), out_shardings=where)()


def make_gradient(config: Config) -> Callable[..., tuple[Any, TrainingLoss, jax.Array]]:
    """`gradient(params, tokens_UBS, labels_UBS, n_U, k_U, index_U, weight_U) -> gradients, outputs, finite_U` of one
    device.

    The parameters are this device's shards in `model.dtype`. The gradients are its shards in `model.param_dtype`,
    summed over micro-batches and devices; those of a single micro-batch over devices in `model.dtype`, during its
    backward pass. The outputs are stacked over micro-batches and equal on all devices. `finite_U` says which
    micro-batches have a finite loss and, if there are several, a finite gradient. Every micro-batch has its own s_0,
    drawn from (seed, index, row) for this device's rows. Each micro-batch's log_ppl is multiplied by its `weight_U`,
    unless that is None.

    The balance loss of a router takes f from all its calls in this step's micro-batches so far, the present one
    included: balance within every few sequences, or within every recurrence, would keep experts from specialising.

    One compilation serves every depth. Unless `compute.remat` is full, the program contains two gradient paths: an
    unrolled one for the usual k, whose residuals need no stacked buffers, and a loop for the rarer smaller k
    (docs/performance.md).
    """
    graphdef, _ = abstract_model(config)
    micro_batches = config.train.micro_batches
    state_key = jax.random.key(config.train.seed)
    usual_k = config.recurrence.gradient_steps

    def loss(params: Any, tokens_BS, labels_BS, n, k, index, weight, earlier_QE) -> tuple[jax.Array, TrainingLoss]:
        shape = (*tokens_BS.shape, config.model.width)
        key = jax.random.fold_in(state_key, index)
        first_row = device_index() * tokens_BS.shape[0]
        initial_state = initializers.random_state(key, shape, jnp.dtype(config.model.dtype), first_row)
        if micro_batches == 1:
            params = shared(params)
        output = nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, n, k, initial_state, earlier_QE)
        if weight is not None:
            log_ppl = weight * output.log_ppl
            output = dataclasses.replace(output, log_ppl=log_ppl, loss=output.loss - output.log_ppl + log_ppl)
        # Every device differentiates the loss of the whole batch; the gradients are summed, so each takes a share.
        return output.loss / device_count(), output

    differentiate = jax.grad(loss, has_aux=True)  # a loop for a traced k, straight-line code for a static one

    def straight(params, tokens_BS, labels_BS, n, k, *others):
        return differentiate(params, tokens_BS, labels_BS, n, usual_k, *others)

    def gradient(*inputs):
        if config.compute.remat == "full":
            return differentiate(*inputs)
        *_, k, _, _, _ = inputs
        return lax.cond(k == usual_k, straight, differentiate, *inputs)

    def run(
        params: Any, tokens_UBS, labels_UBS, n_U, k_U, index_U, weight_U=None
    ) -> tuple[Any, TrainingLoss, jax.Array]:
        inputs_U = tokens_UBS, labels_UBS, n_U, k_U, index_U, weight_U
        if micro_batches == 1:  # no accumulator in memory, summed within `loss`; the step itself checks the norm
            gradients, output = gradient(params, *jax.tree.map(lambda x: x[0], inputs_U), 0.0)
            outputs = jax.tree.map(lambda x: x[None], output)
            finite_U = jnp.isfinite(outputs.loss)
        else:

            def micro_step(carry, inputs):
                total, earlier_QE = carry
                gradients, output = gradient(params, *inputs, earlier_QE)
                bad = ~jnp.isfinite(optax.tree.norm(gradients))  # finite only if all elements are
                finite = jnp.isfinite(output.loss) & (batch_sum(bad.astype(jnp.int32)) == 0)
                total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients)
                if output.moe is not None:
                    earlier_QE += output.moe.counts_QE
                return (total, earlier_QE), (output, finite)

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, config.model.param_dtype), params)
            routers = 1 if config.moe.placement == "injection" else config.model.core_layers
            none_QE = jnp.zeros((routers, config.moe.experts), at_least_float32(config.model.dtype))
            (gradients, _), (outputs, finite_U) = lax.scan(micro_step, (zeros, none_QE), inputs_U)
            gradients = summed_gradients(gradients)
        return jax.tree.map(lambda g: g.astype(config.model.param_dtype), gradients), outputs, finite_U

    return run


def make_train_step(config: Config, mesh: Mesh | None = None) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens_BS, labels_BS, n_U, k_U) -> state, metrics`; `jit_train_step` compiles it.

    The batch is that of the whole step. It is cut in order into `train.micro_batches` parts, each with its own depth
    (`sample_depths`). The loss is the mean over all labels of the step that count: where rows mask labels, every
    micro-batch has its share of them as weight. Gradients are taken with respect to the weights in `model.dtype`.
    Without a mesh the step runs on one device.

    If a loss or gradient is not finite the update is skipped: weights and optimiser state, the schedule's count
    included, keep their exact values.
    """
    mesh = mesh or make_mesh(config, jax.devices()[:1])
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    micro_batches = config.train.micro_batches
    in_order = PartitionSpec(None, AXES)  # every micro-batch is sharded over all devices

    def step(state: TrainState, tokens_BS: jax.Array, labels_BS: jax.Array, n_U: jax.Array, k_U: jax.Array):
        params = cast_params(state.params, config.model.dtype)
        split = specs(params)
        gradient = per_device(
            make_gradient(config),
            mesh,
            in_specs=(split, in_order, in_order, *[REPLICATED] * 4),
            out_specs=(split, REPLICATED, REPLICATED),
        )
        index_U = state.step * micro_batches + jnp.arange(micro_batches, dtype=jnp.int32)
        tokens_UBS, labels_UBS = (x.reshape(micro_batches, -1, *x.shape[1:]) for x in (tokens_BS, labels_BS))
        weight_U = None
        if config.data.masks_labels and micro_batches > 1:
            counted_U = jnp.sum(labels_UBS != IGNORE, axis=(1, 2)).astype(at_least_float32(config.model.dtype))
            weight_U = counted_U * (micro_batches / jnp.maximum(counted_U.sum(), 1))
        grads, outputs, finite_U = gradient(params, tokens_UBS, labels_UBS, n_U, k_U, index_U, weight_U)
        grads = jax.tree.map(lambda g: g / micro_batches, grads)
        grad_norm = optax.tree.norm(grads)
        good = finite_U.all() & jnp.isfinite(grad_norm)
        finite_U = good[None] if micro_batches == 1 else finite_U

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_params = optax.apply_updates(state.params, updates)
            # A select per element fuses into the update, which reads the old value anyway, so it costs no time and no
            # second copy of the state. `lax.cond` would prevent the update from reusing the donated buffers.
            new_params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), (new_params, opt_state), (state.params, state.opt_state)
            )
        skipped = state.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        metrics = StepMetrics(
            loss=outputs.log_ppl.mean(),
            objective=outputs.loss.mean(),
            grad_norm=grad_norm,
            param_norm=optax.tree.norm(new_params),
            learning_rate=schedule(state.step - state.skipped),
            finite_U=finite_U,
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


def jit_train_step(config: Config, mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """`make_train_step` under `jax.jit`, the state donated, compiled with the options that the config needs."""
    # XLA tries Triton's matmuls before it takes cuBLAS's, which are faster in 8 bits; trying them takes minutes.
    options = {"xla_gpu_enable_triton_gemm": False} if config.compute.fp8 else None
    return jax.jit(make_train_step(config, mesh), donate_argnums=0, compiler_options=options)
