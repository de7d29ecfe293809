"""Exit criteria against a plain loop in NumPy that decides step by step, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.config.checks import ConfigError
from jax_huginn.inference.exits import THRESHOLDS, Exit, begin, decide

STEPS, TOKENS, WIDTH, VOCABULARY = 24, 7, 6, 11


def plain_exit(rule: Exit, states: np.ndarray, predictions: np.ndarray) -> int | None:
    """The recurrence after which one token exits; `states` are s_0..s_R, `predictions` p_1..p_R."""
    tested = [i for i in range(1, len(states)) if i % rule.every == 0]
    in_a_row = 0
    for place, i in enumerate(tested[1:], start=1):
        before, s = tested[place - 1], states[i]
        p, q = predictions[i - 1], predictions[before - 1]
        entropy = lambda p: -sum(x * np.log(x) for x in p)  # noqa: E731
        kl = lambda p, q: sum(x * np.log(x / y) for x, y in zip(p, q, strict=True))  # noqa: E731
        if rule.name in ("kl", "kl-entropy"):
            holds = kl(p, q) < rule.limit and (rule.name == "kl" or entropy(p) < rule.entropy)
        elif rule.name == "minp-kl":
            kept = [token for token in range(len(p)) if p[token] >= 0.1 * max(p)]
            holds = kl(p[kept] / sum(p[kept]), q[kept] / sum(q[kept])) < rule.limit
        elif rule.name == "entropy-diff":
            holds = abs(entropy(p) - entropy(q)) < rule.limit
        elif rule.name == "argmax-stability":
            holds = int(np.argmax(p)) == int(np.argmax(q))
        elif rule.name == "latent-diff":
            holds = np.sqrt(sum((s - states[before]) ** 2)) / np.sqrt(sum(s**2)) < rule.limit
        elif rule.name == "cosine":
            t = states[before]
            holds = 1 - sum(s * t) / np.sqrt(sum(s**2) * sum(t**2)) < rule.limit
        else:
            earlier = states[tested[place - 2]] if place > 1 else states[0]
            second = s - 2 * states[before] + earlier
            holds = np.sqrt(sum(second**2)) / np.sqrt(sum(s**2)) < rule.limit
        in_a_row = in_a_row + 1 if holds else 0
        needed = {"argmax-stability": rule.limit, "acceleration": 2}.get(rule.name, 1)
        if in_a_row >= needed and i >= rule.min_steps:
            return i
    return None


@pytest.fixture(scope="module")
def trajectories():
    """States and logits that settle at a different pace for every token, with some noise, in float64."""
    random = np.random.default_rng(0)
    pace = np.linspace(0.15, 0.9, TOKENS)[None, :, None] ** np.arange(STEPS + 1)[:, None, None]
    states = random.normal(size=(TOKENS, WIDTH)) + pace * random.normal(size=(STEPS + 1, TOKENS, WIDTH))
    logits = 3 * random.normal(size=(TOKENS, VOCABULARY)) + pace[1:] * random.normal(size=(STEPS, TOKENS, VOCABULARY))
    return states, logits


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("min_steps", [1, 6])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_tokens_exit_where_a_plain_loop_says(trajectories, name, min_steps, every):
    states, logits = trajectories
    threshold = {"acceleration": 0.05, "argmax-stability": 3}.get(name)
    rule = Exit(name, threshold, entropy=1.2, min_steps=min_steps, every=every)
    predictions = np.exp(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    expected = [plain_exit(rule, states[:, token], predictions[:, token]) for token in range(TOKENS)]

    memory = begin(rule, jnp.asarray(states[0]), VOCABULARY)
    found: list[int | None] = [None] * TOKENS
    for i in range(1, STEPS + 1):
        read = jnp.asarray(logits[i - 1]) if rule.reads_predictions else None
        done, memory = decide(rule, jnp.full(TOKENS, i), jnp.asarray(states[i]), read, memory)
        for token in np.flatnonzero(np.asarray(done)):
            found[token] = found[token] or i
    assert found == expected
    assert len(set(found)) > 1  # the tokens do differ


@pytest.mark.parametrize("name", ["kl", "latent-diff", "argmax-stability"])
def test_tokens_at_different_recurrences_decide_as_they_would_alone(trajectories, name):
    """Token t is t recurrences late."""
    states, logits = trajectories
    rule = Exit(name)
    exits = []
    for late in (0, 1):
        memory = begin(rule, jnp.asarray(states[0]), VOCABULARY)
        found = np.zeros(TOKENS, int)
        for now in range(1, STEPS + 1 + late * TOKENS):
            step = np.clip(now - late * np.arange(TOKENS), 1, STEPS)
            running = step == now - late * np.arange(TOKENS)
            each = np.arange(TOKENS)
            new = decide(
                rule, jnp.asarray(step), jnp.asarray(states[step, each]), jnp.asarray(logits[step - 1, each]), memory
            )
            done = np.asarray(new[0]) & running & (found == 0)
            keep = lambda a, b: jnp.where(running.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: B023, E731
            memory = type(memory)(*map(keep, new[1], memory))
            found[done] = step[done]
        exits.append(found)
    np.testing.assert_array_equal(*exits)
    assert (exits[0] > 0).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "kll"}, ["'kll'", "kl, kl-entropy"]),
        ({"name": "acceleration"}, ["acceleration", "--exit_threshold"]),
        ({"name": "kl", "threshold": 0.0}, ["exit_threshold=0.0"]),
        ({"name": "kl", "min_steps": 0}, ["min_steps=0"]),
        ({"name": "kl", "every": 0}, ["exit_every=0"]),
    ],
)
def test_a_criterion_that_cannot_work_is_one_line(arguments, words):
    with pytest.raises(ConfigError) as error:
        Exit(**arguments)
    assert all(word in str(error.value) for word in words)
