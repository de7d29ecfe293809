"""Cached generation writes the same text in both packages, with the same scores."""

import numpy as np
import pytest

from jax_huginn.inference import generate, programs
from parity_tests.support import COMPILER_OPTIONS, VALUES, make_pair
from torch_reference.cache import Cache
from torch_reference.generate import greedy

RECURRENCE, NEW = 5, 10


@pytest.mark.parametrize(("kind", "dtype"), [("grouped", "float64"), ("core", "float64"), ("injection", "float32")])
def test_both_write_the_same_greedily(kind, dtype, monkeypatch):
    """Ragged prompts; the scores are the log-probabilities of the tokens, by the twin's own cache."""
    monkeypatch.setitem(programs.OPTIONS, "cpu", COMPILER_OPTIONS)
    pair, random = make_pair(kind, dtype), np.random.default_rng(0)
    prompts = [random.integers(0, pair.config.model.vocab_size, length).tolist() for length in (64, 9)]
    rows, _ = generate(pair.model(), prompts, max_new_tokens=NEW, recurrence=RECURRENCE)
    assert greedy(pair.twin, prompts, (RECURRENCE, 0), NEW) == [row.tokens for row in rows]

    for i, row in enumerate(rows):
        found = []
        cache = Cache(pair.twin, (RECURRENCE, 0))
        for piece in (prompts[i], *([token] for token in row.tokens[:-1])):
            log_p = pair.twin.unembed(cache.read([piece])[0, -1]).log_softmax(-1)
            found.append(log_p[row.tokens[len(found)]].item())
        difference = np.linalg.norm(np.subtract(found, row.logprobs))
        assert difference <= VALUES[dtype] * np.linalg.norm(found)
