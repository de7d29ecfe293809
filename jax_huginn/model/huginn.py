"""MoE-Huginn: prelude, Mixture of Experts at the injection, recurrent core, coda, tied head (arXiv 2502.05171).

    e      = wte[tokens] * sqrt(D);  e = prelude(e);  e = norm_moe(moe(e))
    s_i    = core(adapter(concat[s_{i-1}, e])),  i = 1..n+k
    logits = norm_f(coda(norm_f(s))) @ wte.T

Training, validation, scoring and decoding share four verbs: `inject`, `recur`, `read_out`, and `head` or `loss`.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.config.schema import Config
from jax_huginn.model import functional, initializers, remat
from jax_huginn.model.blocks import Positions, RMSNorm, SandwichBlock
from jax_huginn.model.cache import KV, Cache
from jax_huginn.model.inputs import token_array
from jax_huginn.model.moe import MoE, Routing
from jax_huginn.model.parameters import cast_params, fp8_copies, with_copies
from jax_huginn.model.recurrence import Depth, Plan, iterate
from jax_huginn.model.sharding import gathered
from jax_huginn.model.statistics import recurrence_statistics
from jax_huginn.ops.cross_entropy import IGNORE, cross_entropy, most_likely
from jax_huginn.ops.fp8 import matmul
from jax_huginn.ops.norm import at_least_float32
from jax_huginn.ops.rope import rope_table
from jax_huginn.parallel.mesh import batch_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch and the statistics that are logged with it."""

    loss: jax.Array
    """log_ppl plus the weighted auxiliary losses."""
    log_ppl: jax.Array
    """Mean cross-entropy in nats over the labels that are not -100."""
    moe: Routing | None
    """Routing statistics; None for a dense model. With placement "core", only of the steps with gradient."""
    recurrence: dict[str, jax.Array]
    """Scalars of the last recurrence, see `recurrence_statistics`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HuginnOutput:
    """The result of a forward pass; fields shared with `TrainingLoss` have the same meaning."""

    logits: jax.Array
    """(B,S,V), at least float32."""
    latents: jax.Array
    """norm_f(s_R), the coda's input: (B,S,D)."""
    loss: jax.Array | None
    """None without labels, as is `log_ppl`."""
    log_ppl: jax.Array | None
    moe: Routing | None
    recurrence: dict[str, jax.Array]


class Hidden(NamedTuple):
    """The result of everything before the head."""

    y_BSD: jax.Array
    """The coda's output after norm_f."""
    latents_BSD: jax.Array
    routing: Routing | None
    recurrence: dict[str, jax.Array]


class MoEHuginnModel(nnx.Module):
    """The model as a module; `functional.split` it to run it under plain JAX transforms.

    `__call__` and `training_loss` compute in `model.dtype` whatever the type of the parameters. The verbs compute in
    the type of the parameters; call them on the result of `cast`.

    Args:
        config: the whole config; sections `model`, `moe`, `recurrence`, `compute` and `parallel` are read.
        seed: seed of the initial weights, `config.train.seed` by default.
    """

    def __init__(self, config: Config, seed: int | None = None):
        model, moe = config.model, config.moe
        rngs = nnx.Rngs(config.train.seed if seed is None else seed)
        matrix = initializers.matrix(config)
        routed, injected = moe.experts > 0, moe.placement == "injection"

        def blocks(count: int, moe: bool = False) -> nnx.List:
            return nnx.List([SandwichBlock(config, rngs, moe=moe) for _ in range(count)])

        self.config = config
        self.wte = nnx.Param(matrix(rngs.params(), (model.vocab_size, model.width), model.param_dtype))
        self.prelude = blocks(model.prelude_layers)
        self.moe: MoE | None = MoE(config, rngs) if routed and injected else None
        self.norm_moe: RMSNorm | None = RMSNorm(config) if routed and injected else None
        self.adapter = nnx.Param(matrix(rngs.params(), (2 * model.width, model.width), model.param_dtype))
        self.core = blocks(model.core_layers, moe=routed and not injected)
        self.coda = blocks(model.coda_layers)
        self.norm_f = RMSNorm(config)

    # ---- A whole forward pass ---------------------------------------------------------------------------------------

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
            num_steps: (n, k), recurrences without and with gradient; n may be traced, k is static. Default: the mean
                depth, with `recurrence.gradient_steps` as k.
            initial_state: s_0, (B,S,D) or broadcastable. Default: `initializers.fixed_state` of seed 0, which is the
                same for every row and batch size, so that scores are reproducible.
            labels: (B,S), already the next tokens; -100 is ignored.

        Raises:
            ValueError: an id beyond the vocabulary, or a shape or depth that cannot be.
        """
        recurrence, vocabulary = self.config.recurrence, self.config.model.vocab_size
        tokens_BS = token_array("tokens", tokens_BS, vocabulary)
        if labels is not None:
            labels = token_array("labels", labels, vocabulary, IGNORE)
            if labels.shape != tokens_BS.shape:
                raise ValueError(f"labels has shape {labels.shape}, not {tokens_BS.shape} as tokens")
        n, k = num_steps or (recurrence.mean - recurrence.gradient_steps, recurrence.gradient_steps)
        if any(isinstance(each, int) and each < 0 for each in (n, k)):
            raise ValueError(f"num_steps={(n, k)} must not be negative")
        if initial_state is None:
            initial_state = jnp.asarray(initializers.fixed_state(0, tokens_BS.shape[1], self.config.model.width))
        model = self.cast()
        hidden = model.hidden(tokens_BS, n, k, initial_state)
        logits = model.head(hidden.y_BSD)
        loss, log_ppl = (None, None) if labels is None else model.loss(hidden.y_BSD, labels, hidden.routing)
        return HuginnOutput(logits, hidden.latents_BSD, loss, log_ppl, hidden.routing, hidden.recurrence)

    def training_loss(
        self,
        tokens_BS: jax.Array,
        labels_BS: jax.Array,
        n: Depth,
        k: Depth,
        initial_state: jax.Array,
        earlier_QE: jax.Array | float = 0.0,
    ) -> TrainingLoss:
        """The loss at a given depth, without logits; `earlier_QE` as in `Routing.balance`.

        With a traced k one compilation serves every k from 1 to `recurrence.backprop_depth`; its backward pass
        recomputes whole recurrences, whatever `compute.remat` is. Validation passes a static k of 0.
        """
        model = self.cast()
        training = not (isinstance(k, int) and k == 0)
        hidden = model.hidden(tokens_BS, n, k, initial_state, fp8=training and self.config.compute.fp8)
        loss, log_ppl = model.loss(hidden.y_BSD, labels_BS, hidden.routing, earlier_QE)
        return TrainingLoss(loss, log_ppl, hidden.routing, hidden.recurrence)

    def cast(self) -> "MoEHuginnModel":
        """A view of the model with parameters in `model.dtype`, see `cast_params`."""
        return functional.with_params(self, cast_params(functional.params_of(self), self.config.model.dtype))

    def hidden(
        self, tokens_BS: jax.Array, n: Depth, k: Depth, initial_state: jax.Array, *, fp8: bool = False
    ) -> Hidden:
        """Everything before the head, without a cache; with `fp8`, the matmuls of the recurrences in 8-bit floats."""
        at = self.positions(tokens_BS.shape[1])
        model = self._with_whole_core()
        injected_BSD, routing, _ = model.inject(tokens_BS, at)
        state_BSD = jnp.broadcast_to(initial_state, injected_BSD.shape).astype(injected_BSD.dtype)

        inputs = model.recurrent_weights(), injected_BSD
        copies = fp8_copies(inputs[0]) if fp8 else None

        def step(inputs: Any, state_BSD: jax.Array) -> tuple[jax.Array, Routing | None]:
            weights, injected_BSD = inputs
            weights = weights if copies is None else with_copies(weights, copies)
            state_BSD, routing, _ = model.recur(injected_BSD, state_BSD, at, weights=weights)
            return state_BSD, routing

        plan = Plan(self.config.recurrence.backprop_depth, self._checkpoint, self.config.compute.unroll)
        last = iterate(step, inputs, state_BSD, n, k, plan)
        latents_BSD, y_BSD, _ = self.read_out(last.state_BSD, at)
        routing = last.routing if routing is None else routing
        statistics = recurrence_statistics(last.state_BSD, y_BSD, last.residual)
        return Hidden(y_BSD, latents_BSD, routing, statistics)

    # ---- The verbs --------------------------------------------------------------------------------------------------

    def positions(self, index: int | jax.Array) -> Positions:
        """Positions to pass to the verbs: the first `index`, or those in an integer array (B,S).

        Angles are in at least float32.
        """
        model = self.config.model
        length = index if isinstance(index, int) else model.max_length
        if length > model.max_length:
            raise ValueError(f"sequence of {length} tokens is longer than model.max_length={model.max_length}")
        table = jnp.asarray(rope_table(length, model.head_dim, model.rope_base), at_least_float32(model.dtype))
        if isinstance(index, int):
            return Positions(table, jnp.arange(length)[None])
        return Positions(table.at[index].get(mode="clip"), index)

    def inject(
        self, tokens_BS: jax.Array, at: Positions, cache: Cache | None = None
    ) -> tuple[jax.Array, Routing | None, Cache | None]:
        """The input that all recurrences share, from the tokens: prelude, injection MoE, lower half of the adapter.

        concat[s, e] @ adapter = s @ upper half + e @ lower half, and the second term is constant over recurrences.
        """
        routing = None
        with jax.named_scope("prelude"):
            e_BSD = self._whole("wte")[tokens_BS] * math.sqrt(self.config.model.width)
            e_BSD, kept = self._through(self.prelude, e_BSD, at, cache and cache.prelude)
        if self.moe is not None and self.norm_moe is not None:
            with jax.named_scope("moe"):
                moe_BSD, routing = self._remat(self.moe)(e_BSD)
                e_BSD = self.norm_moe(e_BSD + moe_BSD if self.config.moe.residual else moe_BSD)
        with jax.named_scope("adapter"):
            injected_BSD = e_BSD @ self.adapter[...][self.config.model.width :]
        return injected_BSD, routing, cache and cache._replace(prelude=kept)

    def recur(
        self,
        injected_BSD: jax.Array,
        state_BSD: jax.Array,
        at: Positions,
        cache: Cache | None = None,
        slot: int | jax.Array = 0,
        weights: Any = None,
    ) -> tuple[jax.Array, Routing | None, Cache | None]:
        """One recurrence: the adapter and the core.

        Args:
            slot: slot of the cache to which this recurrence's keys and values are written and from which they are read.
            weights: the result of `recurrent_weights`, for a caller that differentiates or freezes them separately.
        """
        weights = weights or self.recurrent_weights()
        routings, kept = [], []
        with jax.named_scope("adapter"):
            x_BSD = checkpoint_name(matmul(state_BSD, weights["adapter"]), "matmul") + injected_BSD
        with jax.named_scope("core"):
            blocks = functional.with_params(self.core, weights["core"])
            for block, kv in zip(blocks, _caches(cache and cache.core, len(blocks)), strict=True):
                x_BSD, seen, kv = block(x_BSD, at, kv, slot)
                routings.append(seen)
                kept.append(kv)
        routing = None if routings[0] is None else Routing.combine(routings)
        return x_BSD, routing, cache and cache._replace(core=tuple(kept))

    def recurrent_weights(self) -> Any:
        """The weights of `recur`: the adapter's upper half, applied to the state, and the parameters of the core."""
        return {"adapter": self.adapter[...][: self.config.model.width], "core": functional.params_of(self.core)}

    def read_out(
        self, state_BSD: jax.Array, at: Positions, cache: Cache | None = None
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """The latents norm_f(s) and the coda's output after norm_f, (B,S,D) each."""
        with jax.named_scope("coda"):
            latents_BSD = self.norm_f(state_BSD)
            y_BSD, kept = self._through(self.coda, latents_BSD, at, cache and cache.coda)
            y_BSD = self.norm_f(y_BSD)
        return latents_BSD, y_BSD, cache and cache._replace(coda=kept)

    def head(self, y_BSD: jax.Array) -> jax.Array:
        """Logits (B,S,V) in at least float32."""
        return (y_BSD @ self._whole("wte").T).astype(at_least_float32(y_BSD.dtype))

    def most_likely(self, y_BSD: jax.Array) -> jax.Array:
        """The most likely next tokens, (B,S) int32, without materialising the logits."""
        return most_likely(y_BSD, self._whole("wte"), self.config.compute.loss_chunk)

    def loss(
        self,
        y_BSD: jax.Array,
        labels_BS: jax.Array,
        routing: Routing | None,
        earlier_QE: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """The loss with its auxiliaries, and log_ppl, over all devices, without materialising the logits."""
        with jax.named_scope("head"):
            mean = jnp.asarray(cross_entropy(y_BSD, self._whole("wte"), labels_BS, self.config.compute.loss_chunk))
            counted = jnp.sum(labels_BS != IGNORE).astype(mean.dtype)
            log_ppl = batch_sum(mean * (counted / jnp.maximum(batch_sum(counted), 1)))
        if routing is None:
            return log_ppl, log_ppl
        moe = self.config.moe
        return log_ppl + moe.balance_weight * routing.balance(earlier_QE) + moe.z_weight * routing.z_loss, log_ppl

    # ---- Plumbing ---------------------------------------------------------------------------------------------------

    def _through(
        self, blocks: nnx.List, x_BSD: jax.Array, at: Positions, caches: tuple[KV, ...] | None
    ) -> tuple[jax.Array, tuple[KV, ...]]:
        kept = []
        for block, kv in zip(blocks, _caches(caches, len(blocks)), strict=True):
            x_BSD, _, kv = self._remat(block)(x_BSD, at, kv)
            kept.append(kv)
        return x_BSD, tuple(kept)

    def _checkpoint(self, function):
        return jax.checkpoint(function, policy=remat.POLICIES[self.config.compute.remat])

    def _remat(self, module: nnx.Module):
        """The module as a function whose backward pass recomputes activations according to `compute.remat`."""
        run = self._checkpoint(lambda params, *inputs: functional.with_params(module, gathered(params))(*inputs))
        return partial(run, functional.params_of(module))

    def _whole(self, name: str) -> jax.Array:
        return gathered({name: getattr(self, name)[...]})[name]

    def _with_whole_core(self) -> "MoEHuginnModel":
        """A view of the model with adapter and core gathered once for all recurrences."""
        params = functional.params_of(self)
        return functional.with_params(self, params | gathered({name: params[name] for name in ("adapter", "core")}))


def _caches(caches: tuple[KV, ...] | None, blocks: int) -> tuple[KV | None, ...]:
    return (None,) * blocks if caches is None else caches


def abstract_model(config: Config) -> tuple[nnx.GraphDef, Any]:
    """The structure of the model and the shapes of its parameters; allocates nothing."""
    return functional.split(nnx.eval_shape(lambda: MoEHuginnModel(config)))
