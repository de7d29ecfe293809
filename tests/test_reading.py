"""A text that is read with exits: every prediction is that of the same text cut off there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval_tasks.language_model import Reading
from jax_huginn.inference import Exit, generate
from jax_huginn.inference.evaluation import JaxLanguageModel
from jax_huginn.inference.reading import read_with_exits
from jax_huginn.model import initializers
from tests.test_generation import model_of, prompts_of

MOST, LENGTHS = 8, (14, 9)


def test_every_position_is_the_end_of_a_prompt():
    rule = Exit("kl", 0.01)
    model, texts = model_of(), prompts_of(*LENGTHS)
    prefixes = [text[: end + 1] for text in texts for end in range(len(text))]
    expected, _ = generate(model, prefixes, max_new_tokens=1, recurrence=MOST, exit=rule)
    tokens_BS = np.zeros((3, 16), np.int32)  # a row and columns of padding
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = text
    state_SD = jnp.asarray(initializers.fixed_state(0, 16, model.config.model.width))
    length_B = jnp.array([*LENGTHS, 0])
    read = jax.jit(lambda *inputs: read_with_exits(model, rule, *inputs))
    found = read(jnp.asarray(MOST), jnp.asarray(tokens_BS), length_B, state_SD)
    logits = np.asarray(model.head(found.y_BSD))
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    places = [(row, end) for row, text in enumerate(texts) for end in range(len(text))]
    steps = [int(found.steps_BS[place]) for place in places]
    assert steps == [each.steps[0] for each in expected]
    assert len(set(steps)) > 2  # the tokens do differ
    assert found.steps_BS.sum() == sum(steps)  # padding uses nothing
    assert found.computed == max(steps)
    best = [each.tokens[0] for each in expected]
    assert [log_p[place].argmax() for place in places] == best
    np.testing.assert_allclose(
        [log_p[place].max() for place in places], [each.logprobs[0] for each in expected], rtol=0, atol=1e-10
    )

    # The same by way of scores.
    ends = [expected[LENGTHS[0] - 1], expected[-1]]
    readings = [Reading(tuple(text), ((end.tokens[0],),)) for text, end in zip(texts, ends, strict=True)]
    scores = JaxLanguageModel(model, rule).log_probabilities(readings, MOST)
    for row, ((score,), end) in enumerate(zip(scores, ends, strict=True)):
        assert score.greedy
        assert score.log_probabilities == pytest.approx(end.logprobs, abs=1e-10)
        assert score.used == int(found.steps_BS[row].sum())
        assert score.computed == max(steps) * LENGTHS[row]
