"""The choice of the next token: filters against their definitions, draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.config.checks import ConfigError
from jax_huginn.inference.sampling import Sampling, _filtered, choose

VOCABULARY = 50


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(scale=2, size=(4, VOCABULARY)))


def draws(rule, logits_V, count):
    rows = jnp.broadcast_to(logits_V, (count, VOCABULARY))
    nothing = jnp.zeros((count, VOCABULARY), bool)
    return np.asarray(choose(rule, rows, nothing, jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.int32))[0])


def test_temperature_zero_is_the_most_likely_token_with_its_log_probability(logits):
    nothing = jnp.zeros(logits.shape, bool)
    token, log_p = choose(Sampling(top_k=3), logits, nothing, jnp.zeros(4, jnp.uint32), jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(log_p, np.max(np.asarray(jax.nn.log_softmax(logits)), axis=-1), rtol=1e-12)


def test_draws_have_the_distribution_of_the_softmax(logits):
    count = 20_000
    expected = np.asarray(jax.nn.softmax(logits[0] / 0.7))
    found = np.bincount(draws(Sampling(temperature=0.7), logits[0], count), minlength=VOCABULARY)
    chi2 = np.sum((found - count * expected) ** 2 / (count * expected))
    assert chi2 < 49 + 5 * np.sqrt(2 * 49)  # five standard deviations above the mean of chi-squared


def kept(rule, logits):
    return [set(np.flatnonzero(row)) for row in np.isfinite(np.asarray(_filtered(rule, logits)))]


def test_filters_keep_what_they_define(logits):
    for row, by_k, by_p, by_min in zip(
        np.asarray(logits),
        kept(Sampling(temperature=1, top_k=5), logits),
        kept(Sampling(temperature=1, top_p=0.8), logits),
        kept(Sampling(temperature=1, min_p=0.2), logits),
        strict=True,
    ):
        order, p = np.argsort(-row), np.exp(row) / np.exp(row).sum()
        assert by_k == set(order[:5])
        needed = int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1
        assert by_p == set(order[:needed])
        assert by_min == set(np.flatnonzero(p >= 0.2 * p.max()))


def test_the_most_likely_token_is_never_left_out(logits):
    for rule in (
        Sampling(top_p=1e-9, temperature=1),
        Sampling(top_k=1, temperature=1),
        Sampling(min_p=1, temperature=1),
    ):
        np.testing.assert_array_equal(draws(rule, logits[0], 50), np.argmax(logits[0]))


def test_a_row_depends_on_its_seed_and_its_length_alone(logits):
    rule = Sampling(temperature=1.5)
    seeds, made = jnp.array([7, 8, 7, 9], jnp.uint32), jnp.array([0, 1, 3, 3], jnp.int32)
    nothing = jnp.zeros(logits.shape, bool)
    together = choose(rule, logits, nothing, seeds, made)[0]
    alone = [
        choose(rule, logits[i : i + 1], nothing[:1], seeds[i : i + 1], made[i : i + 1])[0][0] for i in (2, 0, 3, 1)
    ]
    np.testing.assert_array_equal(together[jnp.array([2, 0, 3, 1])], alone)


def test_a_repetition_penalty_lowers_what_was_seen(logits):
    best = jnp.argmax(logits, axis=-1)
    seen = jax.nn.one_hot(best, VOCABULARY, dtype=bool)
    token, log_p = choose(
        Sampling(repetition_penalty=100.0), logits, seen, jnp.zeros(4, jnp.uint32), jnp.zeros(4, jnp.int32)
    )
    assert (token != best).all()
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(log_p, expected, rtol=1e-12)  # the model's own, without the penalty


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0), ("repetition_penalty", 0.0)],
)
def test_an_option_that_cannot_work_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Sampling(**{field: value})
