"""MoE-Huginn: prelude, Mixture of Experts at the injection, recurrent core, coda, tied head (arXiv 2502.05171).

Shapes: B batch, S sequence, D width, V vocabulary.

    e      = wte[tokens] * sqrt(D);  e = prelude(e);  e = norm_moe(moe(e))
    s_i    = core(adapter(concat[s_{i-1}, e])),  i = 1..n+k
    logits = norm_f(coda(norm_f(s))) @ wte.T
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers, remat
from jax_huginn.model.blocks import RMSNorm, SandwichBlock
from jax_huginn.model.moe import MoE, Routing
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.recurrence import Depth, iterate
from jax_huginn.model.sharding import gathered
from jax_huginn.ops.cross_entropy import IGNORE, cross_entropy
from jax_huginn.ops.norm import at_least_float32
from jax_huginn.ops.rope import rope_table
from jax_huginn.parallel.mesh import batch_mean, batch_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HuginnOutput:
    """What one forward pass gives."""

    logits: jax.Array | None
    """(B,S,V), at least float32; None from `training_loss`."""
    latents: jax.Array
    """norm_f(s_R), what the coda reads: (B,S,D)."""
    loss: jax.Array | None
    """log_ppl plus the weighted auxiliary losses; None without labels."""
    log_ppl: jax.Array | None
    """Mean cross-entropy in nats over the labels that are not -100."""
    moe: Routing | None
    """Routing statistics; None for a dense model. In placement "core": of the steps with gradient."""
    recurrence: dict[str, jax.Array]
    """Scalars about the last step: residual, relative residual, state norm, token correlations."""


class MoEHuginnModel(nnx.Module):
    """The model as a module; `nnx.split` it to run it under plain JAX transforms.

    Args:
        config: its sections `model`, `moe` and `recurrence` shape the model.
        seed: of the weights; `config.train.seed` when not given.
    """

    def __init__(self, config: Config, seed: int | None = None):
        model, moe = config.model, config.moe
        rngs = nnx.Rngs(config.train.seed if seed is None else seed)
        matrix = initializers.matrix(config)
        core_moe = moe.experts > 0 and moe.placement == "core"

        def blocks(count: int, moe: bool = False) -> nnx.List:
            return nnx.List([SandwichBlock(config, rngs, moe=moe) for _ in range(count)])

        self.config = config
        self.wte = nnx.Param(matrix(rngs.params(), (model.vocab_size, model.width), model.param_dtype))
        self.prelude = blocks(model.prelude_layers)
        if moe.experts > 0 and moe.placement == "injection":
            self.moe = MoE(config, rngs)
            self.norm_moe = RMSNorm(config)
        self.adapter = nnx.Param(matrix(rngs.params(), (2 * model.width, model.width), model.param_dtype))
        self.core = blocks(model.core_layers, moe=core_moe)
        self.coda = blocks(model.coda_layers)
        self.norm_f = RMSNorm(config)

    def __call__(
        self,
        tokens_BS: jax.Array,
        num_steps: tuple[Depth, int] | None = None,
        initial_state: jax.Array | None = None,
        labels: jax.Array | None = None,
    ) -> HuginnOutput:
        """Logits and, with labels, the loss.

        Args:
            tokens_BS: int32 (B,S), S at most `model.max_length`.
            num_steps: (n, k): n recurrences without and k with gradient; n may be traced, k is static. Default: the
                mean depth, of it `recurrence.backprop_depth` with gradient.
            initial_state: s_0, (B,S,D) or broadcastable. Default: `initializers.fixed_state` of seed 0, the same for
                every row and batch, so that scores are reproducible.
            labels: (B,S), the next token at every position already; -100 is ignored.
        """
        recurrence = self.config.recurrence
        if num_steps is None:
            num_steps = (
                max(recurrence.mean - recurrence.backprop_depth, 0),
                min(recurrence.mean, recurrence.backprop_depth),
            )
        if initial_state is None:
            initial_state = jnp.asarray(initializers.fixed_state(0, tokens_BS.shape[1], self.config.model.width))
        n, k = num_steps
        model = self.cast()
        output, y_BSD = model.hidden(tokens_BS, n, k, initial_state)
        logits = (y_BSD @ model.wte[...].T).astype(at_least_float32(y_BSD.dtype))
        output = dataclasses.replace(output, logits=logits)
        return output if labels is None else model.with_loss(output, y_BSD, labels)

    def training_loss(
        self, tokens_BS: jax.Array, labels_BS: jax.Array, n: Depth, k: Depth, initial_state: jax.Array
    ) -> HuginnOutput:
        """The loss at a sampled depth, without logits. Where k is traced, one compilation serves every k of at least 1
        and at most `recurrence.backprop_depth`; it recomputes whole recurrences whatever `compute.remat` says.

        Parameters must already be in the compute type (`cast`), so that gradients can be taken with respect to them.
        """
        output, y_BSD = self.hidden(tokens_BS, n, k, initial_state)
        return self.with_loss(output, y_BSD, labels_BS)

    def cast(self) -> "MoEHuginnModel":
        """A view of the model whose parameters are in `model.dtype`, see `cast_params`."""
        graphdef, params = nnx.split(self)
        return nnx.merge(graphdef, cast_params(nnx.as_pure(params), self.config.model.dtype))

    def embed(self, tokens_BS: jax.Array) -> tuple[jax.Array, Routing | None]:
        """e, the embedding that every recurrence receives: prelude, then the MoE where it is placed here."""
        rope_SK2 = self.rope(tokens_BS.shape[1])
        routing = None
        with jax.named_scope("prelude"):
            e_BSD = self._whole("wte")[tokens_BS] * math.sqrt(self.config.model.width)
            for block in self.prelude:
                e_BSD, _ = self._remat(block)(e_BSD, rope_SK2)
        if hasattr(self, "moe"):
            with jax.named_scope("moe"):
                moe_BSD, routing = self._remat(self.moe)(e_BSD)
                e_BSD = self.norm_moe(e_BSD + moe_BSD if self.config.moe.residual else moe_BSD)
        return e_BSD, routing

    def hidden(
        self, tokens_BS: jax.Array, n: Depth, k: Depth, initial_state: jax.Array
    ) -> tuple[HuginnOutput, jax.Array]:
        """Everything up to the head: the output without logits and loss, and the coda's normed answer (B,S,D)."""
        e_BSD, routing = self.embed(tokens_BS)
        rope_SK2 = self.rope(tokens_BS.shape[1])
        state_BSD = jnp.broadcast_to(initial_state, e_BSD.shape).astype(e_BSD.dtype)

        # concat[s, e] @ adapter = s @ upper half + e @ lower half, and the latter is the same in every recurrence.
        width = self.config.model.width
        adapter = self._whole("adapter")
        state_half_DD, e_half_DD = adapter[:width], adapter[width:]
        with jax.named_scope("adapter"):
            injected_BSD = e_BSD @ e_half_DD

        # The core as a function of its parameters, so that the steps without gradient can run on frozen ones.
        graphdef, core_params = nnx.split(self.core)

        def core(params: Any, injected_BSD: jax.Array, state_BSD: jax.Array) -> tuple[jax.Array, Routing | None]:
            state_half_DD, core_params = params
            routings = []
            with jax.named_scope("adapter"):
                x_BSD = checkpoint_name(state_BSD @ state_half_DD, "matmul") + injected_BSD
            with jax.named_scope("core"):
                for block in nnx.merge(graphdef, core_params):
                    x_BSD, seen = block(x_BSD, rope_SK2)
                    routings.append(seen)
            return x_BSD, None if routings[0] is None else Routing.combine(routings)

        params = (state_half_DD, gathered(nnx.as_pure(core_params)))  # once for all recurrences
        most, unroll = self.config.recurrence.backprop_depth, self.config.compute.unroll
        recurrence = iterate(core, params, injected_BSD, state_BSD, n, k, most, self._checkpoint, unroll)
        with jax.named_scope("coda"):
            latents_BSD = y_BSD = self.norm_f(recurrence.state_BSD)
            for block in self.coda:
                y_BSD, _ = self._remat(block)(y_BSD, rope_SK2)
            y_BSD = self.norm_f(y_BSD)
        output = HuginnOutput(
            logits=None,
            latents=latents_BSD,
            loss=None,
            log_ppl=None,
            moe=routing if routing is not None else recurrence.routing,
            recurrence=_recurrence_statistics(recurrence.state_BSD, y_BSD, recurrence.residual),
        )
        return output, y_BSD

    def with_loss(self, output: HuginnOutput, y_BSD: jax.Array, labels_BS: jax.Array) -> HuginnOutput:
        """The output with `log_ppl` and `loss` filled in."""
        with jax.named_scope("head"):
            mean = jnp.asarray(cross_entropy(y_BSD, self._whole("wte"), labels_BS, self.config.compute.loss_chunk))
            counted = jnp.sum(labels_BS != IGNORE).astype(mean.dtype)
            log_ppl = batch_sum(mean * (counted / jnp.maximum(batch_sum(counted), 1)))
        loss = log_ppl
        if output.moe is not None:
            moe = self.config.moe
            loss = loss + moe.balance_weight * output.moe.balance_loss + moe.z_weight * output.moe.z_loss
        return dataclasses.replace(output, log_ppl=log_ppl, loss=loss)

    def rope(self, length: int) -> jax.Array:
        """Rotary angles of the first `length` positions, in at least float32."""
        model = self.config.model
        if length > model.max_length:
            raise ValueError(f"sequence of {length} tokens is longer than model.max_length={model.max_length}")
        return jnp.asarray(rope_table(length, model.head_dim, model.rope_base), at_least_float32(model.dtype))

    def _checkpoint(self, function):
        return jax.checkpoint(function, policy=remat.POLICIES[self.config.compute.remat])

    def _remat(self, module: nnx.Module):
        """The module as a function whose backward pass recomputes what `compute.remat` says."""
        graphdef, params = nnx.split(module)
        run = self._checkpoint(lambda params, *inputs: nnx.merge(graphdef, gathered(params))(*inputs))
        return partial(run, nnx.as_pure(params))

    def _whole(self, name: str) -> jax.Array:
        return gathered({name: getattr(self, name)[...]})[name]


def abstract_model(config: Config) -> tuple[nnx.GraphDef, Any]:
    """The model's structure and the shapes of its parameters, without allocating any."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MoEHuginnModel(config)))
    return graphdef, nnx.as_pure(params)


def _recurrence_statistics(state_BSD: jax.Array, y_BSD: jax.Array, residual: jax.Array) -> dict[str, jax.Array]:
    state, y = (jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype)) for x in (state_BSD, y_BSD))
    norm = batch_mean(jnp.linalg.norm(state, axis=-1).mean())
    residual = batch_mean(residual)
    return {
        "recurrent_residual": residual,
        "rel_residual": residual / norm,
        "recurrent_state_norm": norm,
        "recurrent_state_token_corr": batch_mean(_token_correlation(state)),
        "last_hidden_token_corr": batch_mean(_token_correlation(y)),
    }


def _token_correlation(x_BSD: jax.Array) -> jax.Array:
    """Mean correlation of a sequence's tokens, their own excluded: near 1 the state has collapsed (public code).

    The mean of all pairwise products of unit vectors is the squared norm of their mean.
    """
    x_BSD = x_BSD - x_BSD.mean(axis=-1, keepdims=True)
    x_BSD = x_BSD / jnp.maximum(jnp.linalg.norm(x_BSD, axis=-1, keepdims=True), 1e-30)
    return jnp.mean(jnp.sum(x_BSD.mean(axis=1) ** 2, axis=-1)) - 1 / x_BSD.shape[1]
