"""What every recurrence of a forward pass gives: the states on the way, and the predictions read out of them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.ops.norm import at_least_float32


class Iterations(NamedTuple):
    """Recurrences 1 to R of a batch."""

    states_RBSD: jax.Array
    """Raw states s_i, before any norm, in at least float32."""
    entropy_RBS: jax.Array
    """Entropy of the prediction at every position, nats."""
    loss_RBS: jax.Array
    """Cross-entropy of the token that follows in the text, nats; NaN at the last position, which nothing follows."""
    top_tokens: jax.Array
    """(R,B,S,top) the most likely tokens, the likeliest first."""
    top_log_p: jax.Array
    """(R,B,S,top) their log-probabilities."""


def return_iterations(model: MoEHuginnModel, tokens_BS: jax.Array, recurrence: int, top: int = 5) -> Iterations:
    """Read the tokens at every depth up to `recurrence` in one pass.

    The initial state is that of scoring, `initializers.fixed_state` of seed 0. Predictions of one recurrence at a time
    are in memory.

    Args:
        tokens_BS: int (B,S), whole sequences without padding.
    """
    graphdef, params = functional.split(model)
    start_SD = jnp.asarray(initializers.fixed_state(0, tokens_BS.shape[1], model.config.model.width))
    return _program(graphdef, params, jnp.asarray(tokens_BS), start_SD, recurrence, top)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _program(
    graphdef: nnx.GraphDef, params: nnx.State, tokens_BS: jax.Array, start_SD: jax.Array, recurrence: int, top: int
) -> Iterations:
    model = nnx.merge(graphdef, params).cast()
    at = model.positions(tokens_BS.shape[1])
    injected_BSD, _, _ = model.inject(tokens_BS, at)

    def step(state_BSD: jax.Array, _: None) -> tuple[jax.Array, Iterations]:
        state_BSD, _, _ = model.recur(injected_BSD, state_BSD, at)
        _, y_BSD, _ = model.read_out(state_BSD, at)
        log_p_BSV = jax.nn.log_softmax(model.head(y_BSD), axis=-1)
        entropy_BS = -jnp.sum(jnp.exp(log_p_BSV) * log_p_BSV, axis=-1)
        loss_BS = -jnp.take_along_axis(log_p_BSV[:, :-1], tokens_BS[:, 1:, None], axis=-1)[..., 0]
        loss_BS = jnp.pad(loss_BS, ((0, 0), (0, 1)), constant_values=jnp.nan)
        log_p, tokens = lax.top_k(log_p_BSV, top)
        raw_BSD = state_BSD.astype(at_least_float32(state_BSD.dtype))
        return state_BSD, Iterations(raw_BSD, entropy_BS, loss_BS, tokens, log_p)

    state_BSD = jnp.broadcast_to(start_SD, injected_BSD.shape).astype(injected_BSD.dtype)
    return lax.scan(step, state_BSD, length=recurrence)[1]
