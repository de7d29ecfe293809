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
    """Routing statistics over all devices, of one call or of several: of Q routers, one at the injection, or one in
    each block of the core, where every recurrence is a call."""

    counts_QE: jax.Array
    """Number of assignments to each expert; summed over calls, not averaged."""
    probability_QE: jax.Array
    """P, the mean over tokens of the full softmax."""
    first_choice_E: jax.Array
    """Number of tokens for which this expert had the highest logit; summed over calls and routers."""
    entropy: jax.Array
    """Mean over tokens of the entropy of the full softmax, nats."""
    z_loss: jax.Array
    """Mean over tokens of the squared logsumexp of the logits."""
    dropped: jax.Array
    """Number of assignments dropped by a dispatch of limited capacity; summed over calls and routers."""

    @property
    def counts_E(self) -> jax.Array:
        return self.counts_QE.sum(axis=0)

    @property
    def probability_E(self) -> jax.Array:
        return self.probability_QE.mean(axis=0)

    @property
    def balance_loss(self) -> jax.Array:
        return self.balance()

    def balance(self, earlier_QE: jax.Array | float = 0.0) -> jax.Array:
        """E * sum_i f_i P_i, averaged over routers; 1 when balanced.

        f, the shares of a router's assignments, includes `earlier_QE`, those of calls that this record lacks. Gradients
        flow through P alone.
        """
        counts_QE = self.counts_QE + earlier_QE
        share_QE = counts_QE / counts_QE.sum(axis=-1, keepdims=True).clip(min=1)
        return counts_QE.shape[-1] * (share_QE * self.probability_QE).sum(axis=-1).mean()

    @classmethod
    def combine(cls, parts: list[Routing]) -> Routing:
        """The record of several routers, one call each."""
        whole = cls.total(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
        return dataclasses.replace(
            whole,
            counts_QE=jnp.concatenate([part.counts_QE for part in parts]),
            probability_QE=jnp.concatenate([part.probability_QE for part in parts]),
        )

    @classmethod
    def total(cls, stacked: Routing) -> Routing:
        """The record of several calls, from their records stacked along a leading axis."""
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), stacked).averaged(stacked.entropy.shape[0])

    def averaged(self, calls: int | jax.Array) -> Routing:
        """The record of `calls` calls, from the sum of their records: counts are summed, the rest is averaged."""
        means = jax.tree.map(lambda leaf: leaf / calls, self)
        return dataclasses.replace(
            means, counts_QE=self.counts_QE, first_choice_E=self.first_choice_E, dropped=self.dropped
        )


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
    routing = Routing(
        counts_QE=batch_sum(jax.nn.one_hot(experts_TA, experts, dtype=dtype).sum(axis=(0, 1)))[None],
        probability_QE=batch_mean(probability_TE.mean(axis=0))[None],
        first_choice_E=batch_sum(jax.nn.one_hot(experts_TA[:, 0], experts, dtype=dtype).sum(axis=0)),
        entropy=batch_mean(-(probability_TE * log_probability_TE).sum(axis=-1).mean()),
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
