"""The next token from the logits of every row: greedy or sampled, with the usual filters.

A row's draws depend on its own seed and on the number of tokens that it has made, never on its batch or place.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_huginn.config.checks import require
from jax_huginn.ops.norm import at_least_float32


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; hashable, so that a compiled program can depend on it. Filters apply in this order.

    Raises:
        ConfigError: an option that cannot work.
    """

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the text so far; 1: none."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy, whatever the filters below."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1: all."""
    min_p: float = 0.0
    """Only tokens of at least this share of the largest probability; 0: all."""

    def __post_init__(self) -> None:
        require(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} must be positive")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 keeps all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]; 0 keeps all tokens")


def choose(
    rule: Sampling, logits_BV: jax.Array, seen_BV: jax.Array, seed_B: jax.Array, made_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of every row, (B,) int32, and its log-probability under the model itself, (B,).

    Args:
        logits_BV: the model's; the log-probability is that of their softmax, before any penalty or filter.
        seen_BV: tokens in the prompt or the text so far, bool; read only with a repetition penalty.
        seed_B: uint32, the rows' own seeds.
        made_B: int32, tokens that each row has made.
    """
    logits_BV = logits_BV.astype(at_least_float32(logits_BV.dtype))
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    if rule.repetition_penalty != 1:
        penalised = jnp.where(logits_BV > 0, logits_BV / rule.repetition_penalty, logits_BV * rule.repetition_penalty)
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if rule.temperature > 0:
        logits_BV = _filtered(rule, logits_BV / rule.temperature) + _gumbel(seed_B, made_B, logits_BV)
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return token_B, jnp.take_along_axis(log_p_BV, token_B[:, None], axis=-1)[:, 0]


def _filtered(rule: Sampling, logits_BV: jax.Array) -> jax.Array:
    """The logits with -inf for the tokens that top_k, top_p and min_p leave out, the most likely one never."""
    if 0 < rule.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, rule.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if rule.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < rule.top_p  # what is more likely does not reach it yet
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if rule.min_p > 0:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(rule.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def _gumbel(seed_B: jax.Array, made_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Gumbel noise, whose sum with logits has its maximum at a draw from their softmax."""

    def row(seed: jax.Array, made: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), made), like_BV.shape[1:], like_BV.dtype)

    return jax.vmap(row)(seed_B, made_B)
