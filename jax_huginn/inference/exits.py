"""Exit criteria: when a token has been thought about long enough.

Every criterion compares what recurrence i gave with what the recurrence tested before gave, for each token by itself.
Names and most thresholds are those of the public Huginn code; `acceleration` is from arXiv 2509.23314. s_i is the raw
state, before any norm; p_i is the prediction read out of it; H is entropy in nats.

    kl                KL(p_i || p_{i-1}) < t
    kl-entropy        the same, and H(p_i) < `entropy`: KL alone is small for a model that keeps guessing
    minp-kl           the same over the tokens with p_i of at least a tenth of the largest, both renormalised over these
    entropy-diff      |H(p_i) - H(p_{i-1})| < t
    argmax-stability  the most likely token was the same t times in a row
    latent-diff       ||s_i - s_{i-1}|| / ||s_i|| < t
    cosine            1 - cos(s_i, s_{i-1}) < t
    acceleration      ||s_i - 2 s_{i-1} + s_{i-2}|| / ||s_i|| < t, twice in a row

Shapes: the leading axes (...) are tokens in any arrangement, (B,) in decoding and (B,S) in scoring; D width, V
vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_huginn.config.checks import require
from jax_huginn.ops.norm import at_least_float32

THRESHOLDS: dict[str, float | None] = {
    "kl": 5e-4,
    "kl-entropy": 5e-4,
    "minp-kl": 1e-5,
    "entropy-diff": 1e-3,
    "argmax-stability": 5,
    "latent-diff": 0.03,
    "cosine": 1e-3,
    "acceleration": None,
}
"""Criteria and their default thresholds; None has to be given."""
ON_STATES = ("latent-diff", "cosine", "acceleration")
"""Criteria that need no prediction, so neither coda nor head."""
MIN_P = 0.1


@dataclass(frozen=True)
class Exit:
    """A criterion with its options; hashable, so that a compiled program can depend on it.

    Raises:
        ConfigError: an unknown criterion, or an option that cannot work.
    """

    name: str
    threshold: float | None = None
    """Default: that of `THRESHOLDS`."""
    entropy: float = 0.3
    """Largest entropy at which kl-entropy exits, nats."""
    min_steps: int = 1
    """Recurrences before which no token exits."""
    every: int = 1
    """Recurrences between tests: multiples of it are tested, each against the one tested before."""

    def __post_init__(self) -> None:
        known = ", ".join(THRESHOLDS)
        require(self.name in THRESHOLDS, f"exit {self.name!r} is not a criterion: choose one of {known}")
        default = THRESHOLDS[self.name]
        require(
            self.threshold is not None or default is not None,
            f"exit {self.name} has no default threshold: give --exit_threshold",
        )
        require(self.limit > 0, f"exit_threshold={self.threshold} must be positive")
        require(self.entropy > 0, f"exit_entropy={self.entropy} must be positive")
        require(self.min_steps > 0, f"min_steps={self.min_steps} must be positive")
        require(self.every > 0, f"exit_every={self.every} must be positive")

    @property
    def limit(self) -> float:
        """The threshold that counts."""
        threshold = THRESHOLDS[self.name] if self.threshold is None else self.threshold
        assert threshold is not None
        return threshold

    @property
    def reads_predictions(self) -> bool:
        """Whether `decide` needs logits."""
        return self.name not in ON_STATES

    def tests(self, step: jax.Array) -> jax.Array:
        """Where recurrence `step`, counted from 1, is tested; (...) bool."""
        return step % self.every == 0


class Memory(NamedTuple):
    """What a criterion remembers of the recurrences tested before."""

    previous: jax.Array
    """Log-probabilities (...,V) or the state (...,D) of the last test."""
    before: jax.Array
    """The state of the test before the last, for `acceleration`; otherwise empty, (...,0)."""
    in_a_row: jax.Array
    """Tests in a row at which the criterion's inner condition held, (...) int32."""


def begin(rule: Exit, state: jax.Array, vocabulary: int) -> Memory:
    """The memory of tokens that have their start state (...,D) and no recurrence yet."""
    leading, dtype = state.shape[:-1], at_least_float32(state.dtype)
    if rule.reads_predictions:
        previous = jnp.full((*leading, vocabulary), -jnp.log(vocabulary), dtype)
    else:
        previous = state.astype(dtype)
    before = previous if rule.name == "acceleration" else jnp.zeros((*leading, 0), dtype)
    return Memory(previous, before, jnp.zeros(leading, jnp.int32))


def decide(
    rule: Exit, step: jax.Array, state: jax.Array, logits: jax.Array | None, memory: Memory
) -> tuple[jax.Array, Memory]:
    """Which tokens exit after recurrence `step`, and the memory for the next.

    Args:
        step: recurrences done, counted from 1, (...) int32; may differ by token.
        state: s_i, (...,D).
        logits: of the prediction read out of it, (...,V); None for a criterion on states.

    Returns:
        done (...) bool, never before the second test; the memory, changed only where `step` is tested.
    """
    if rule.reads_predictions:
        assert logits is not None
        now = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
    else:
        now = state.astype(at_least_float32(state.dtype))
    held = _holds(rule, now, memory)
    tested = rule.tests(step)
    # The first test has nothing to compare with.
    counts = tested & held & (step >= 2 * rule.every)
    in_a_row = jnp.where(counts, memory.in_a_row + 1, jnp.where(tested, 0, memory.in_a_row))
    needed = {"argmax-stability": round(rule.limit), "acceleration": 2}.get(rule.name, 1)
    done = counts & (in_a_row >= needed) & (step >= rule.min_steps)
    new = tested[..., None]
    before = memory.previous if rule.name == "acceleration" else memory.before
    return done, Memory(
        jnp.where(new, now, memory.previous), jnp.where(new, before, memory.before), in_a_row.astype(jnp.int32)
    )


def _holds(rule: Exit, now: jax.Array, memory: Memory) -> jax.Array:
    """Whether the criterion's inner condition holds, (...) bool."""
    previous = memory.previous
    if rule.name == "argmax-stability":
        return jnp.argmax(now, axis=-1) == jnp.argmax(previous, axis=-1)
    if rule.name == "kl-entropy":
        return (_kl(now, previous) < rule.limit) & (_entropy(now) < rule.entropy)
    if rule.name == "minp-kl":
        kept = now >= jnp.max(now, axis=-1, keepdims=True) + jnp.log(MIN_P)
        now, previous = (_renormalised(kept, each) for each in (now, previous))
        return _kl(now, previous) < rule.limit
    if rule.name == "acceleration":
        return _norm(now - 2 * previous + memory.before) / _norm(now) < rule.limit
    measure = {
        "kl": _kl,
        "entropy-diff": lambda now, previous: jnp.abs(_entropy(now) - _entropy(previous)),
        "latent-diff": lambda now, previous: _norm(now - previous) / _norm(now),
        "cosine": lambda now, previous: 1 - jnp.sum(now * previous, axis=-1) / (_norm(now) * _norm(previous)),
    }[rule.name]
    return measure(now, previous) < rule.limit


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats; tokens of probability 0 under p count nothing."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def _entropy(log_p: jax.Array) -> jax.Array:
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)


def _renormalised(kept: jax.Array, log_p: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf), axis=-1)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=-1)
