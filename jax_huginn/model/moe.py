"""Shared-expert Mixture of Experts and its routing statistics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.ops.norm import at_least_float32
from jax_huginn.ops.swiglu import expert_mlp
from jax_huginn.parallel.expert import dispatch
from jax_huginn.parallel.mesh import batch_mean, batch_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Routing statistics over all devices, for one call or averaged over several."""

    counts_E: jax.Array
    """Number of assignments to each expert; summed over calls, not averaged."""
    first_choice_E: jax.Array
    """Number of tokens for which this expert had the highest logit; summed over calls."""
    probability_E: jax.Array
    """P, the mean over tokens of the full softmax."""
    entropy: jax.Array
    """Mean over tokens of the entropy of the full softmax, nats."""
    balance_loss: jax.Array
    """E * sum_i f_i P_i, with f the shares of assignments; 1 when balanced."""
    z_loss: jax.Array
    """Mean over tokens of the squared logsumexp of the logits."""
    dropped: jax.Array
    """Number of assignments dropped by a dispatch of limited capacity; summed over calls."""

    @classmethod
    def zeros(cls, experts: int, dtype: jax.typing.DTypeLike) -> Routing:
        vector, scalar = jnp.zeros(experts, dtype), jnp.zeros((), dtype)
        return cls(vector, vector, vector, scalar, scalar, scalar, scalar)

    @classmethod
    def combine(cls, parts: list[Routing]) -> Routing:
        """Several calls as one record: counts are summed, means and losses averaged."""
        return cls.total(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))

    @classmethod
    def total(cls, stacked: Routing) -> Routing:
        """`combine` for records stacked along a leading axis."""
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), stacked).averaged(stacked.entropy.shape[0])

    def with_earlier(self, earlier_E: jax.Array) -> Routing:
        """The record of one call whose balance loss takes f from earlier calls' assignments too; P stays its own."""
        return dataclasses.replace(self, balance_loss=balance_loss(self.counts_E + earlier_E, self.probability_E))

    def averaged(self, calls: int | jax.Array) -> Routing:
        """The combined record of `calls` calls, from the sum of their records."""
        means = jax.tree.map(lambda leaf: leaf / calls, self)
        return dataclasses.replace(
            means, counts_E=self.counts_E, first_choice_E=self.first_choice_E, dropped=self.dropped
        )


def balance_loss(counts_E: jax.Array, probability_E: jax.Array) -> jax.Array:
    """E * sum_i f_i P_i, with f the shares of the assignments; gradients flow through P alone."""
    return len(counts_E) * jnp.sum(counts_E / counts_E.sum() * probability_E)


def route(x_TD: jax.Array, router_DE: jax.Array, active: int) -> tuple[jax.Array, jax.Array, Routing]:
    """The top-A experts of each token by logit, the softmax over these A logits, and statistics over all devices.

    Returns the experts (T,A) int32, best first, their weights (T,A) and the statistics, both in at least float32.
    """
    dtype = at_least_float32(x_TD.dtype)
    experts = router_DE.shape[1]
    # HIGHEST, because GPUs otherwise compute a float32 matmul in TF32, whose rounding decides close choices.
    logits_TE = jnp.matmul(x_TD.astype(dtype), router_DE.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    logits_TE = checkpoint_name(logits_TE, "matmul")
    chosen_TA, experts_TA = jax.lax.top_k(logits_TE, active)
    log_normalizer_T1 = jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True)
    log_probability_TE = logits_TE - log_normalizer_T1
    probability_TE = jnp.exp(log_probability_TE)
    counts_E = batch_sum(jax.nn.one_hot(experts_TA, experts, dtype=dtype).sum(axis=(0, 1)))
    probability_E = batch_mean(probability_TE.mean(axis=0))
    routing = Routing(
        counts_E=counts_E,
        first_choice_E=batch_sum(jax.nn.one_hot(experts_TA[:, 0], experts, dtype=dtype).sum(axis=0)),
        probability_E=probability_E,
        entropy=batch_mean(-(probability_TE * log_probability_TE).sum(axis=-1).mean()),
        balance_loss=balance_loss(counts_E, probability_E),
        z_loss=batch_mean(jnp.mean(log_normalizer_T1**2)),
        dropped=jnp.zeros((), dtype),
    )
    return experts_TA, jax.nn.softmax(chosen_TA, axis=-1), routing


class Expert(nnx.Module):
    """A SwiGLU expert, w_down(silu(w_gate x) * (w_up x)), or a stack of them if `experts` is given."""

    def __init__(self, config: Config, rngs: nnx.Rngs, experts: tuple[int, ...] = ()):
        width, hidden, dtype = config.model.width, config.moe.width, config.model.param_dtype
        matrix, output = initializers.matrix(config), initializers.expert_output(config)
        self.w_gate = nnx.Param(matrix(rngs.params(), (*experts, width, hidden), dtype))
        self.w_up = nnx.Param(matrix(rngs.params(), (*experts, width, hidden), dtype))
        self.w_down = nnx.Param(output(rngs.params(), (*experts, hidden, width), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return expert_mlp(x, *self.weights)

    @property
    def weights(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.w_gate[...], self.w_up[...], self.w_down[...]


class MoE(nnx.Module):
    """`shared(x) + sum_a p_a expert_a(x)` over the top-A experts of each token."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        shape = (config.model.width, config.moe.experts)
        self.router = nnx.Param(initializers.router(rngs.params(), shape, config.model.param_dtype))
        self.shared = Expert(config, rngs)
        self.experts = Expert(config, rngs, (config.moe.experts,))
        self.active = config.moe.active
        self.parallel = config.parallel

    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, Routing]:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        with jax.named_scope("router"):
            experts_TA, weights_TA, routing = route(x_TD, self.router[...], self.active)
        with jax.named_scope("experts"):
            y_TD, dropped = dispatch(self.parallel, x_TD, experts_TA, weights_TA, self.experts.weights)
        with jax.named_scope("shared_expert"):
            y_TD += self.shared(x_TD)
        y_TD = checkpoint_name(y_TD, "matmul")
        return y_TD.reshape(x_BSD.shape), dataclasses.replace(routing, dropped=dropped)
