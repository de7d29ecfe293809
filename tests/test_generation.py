"""Cached generation is the uncached model; rows do not depend on their batch; policies and exits do what they say."""

import numpy as np
import pytest

from jax_huginn.config.checks import UserError
from jax_huginn.inference import Exit, Sampling, decode, generate
from tests.generation_oracle import generate_plainly
from tests.generation_support import KINDS, model_of, prompts_of, uncached


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [*((kind, "float64", 1e-10) for kind in KINDS), ("dense", "float32", 1e-5), ("core", "float32", 1e-5)],
)
def test_cached_equals_uncached(kind, dtype, tolerance):
    """Greedy tokens, and their log-probabilities by one pass over the whole text."""
    model, recurrence = model_of(kind, dtype), 5
    (row,), totals = generate(model, prompts_of(40), max_new_tokens=12, recurrence=recurrence)
    log_p = uncached(model, (row.prompt + row.tokens)[:-1], recurrence)[39:]
    assert row.tokens == log_p.argmax(-1).tolist()
    np.testing.assert_allclose(row.logprobs, log_p.max(-1), rtol=tolerance, atol=tolerance)
    assert row.steps == [recurrence] * 12
    assert row.finish_reason == "length"
    assert totals.used == totals.computed == 11 * recurrence  # the last token is not computed


@pytest.mark.parametrize(
    ("exit", "sampling"),
    [
        (None, Sampling(temperature=0.8, top_p=0.95)),
        (Exit("latent-diff", 0.4), None),
        (Exit("kl", 0.03), Sampling(temperature=0.8)),
    ],
    ids=["fixed, sampled", "state, greedy", "kl, sampled"],
)
def test_a_row_alone_is_the_row_in_its_batch(exit, sampling, monkeypatch):
    """Eight ragged prompts with different exits; two of them also alone without any padding."""
    model, lengths = model_of("injection"), (3, 40, 17, 1, 33, 8, 64, 25)
    prompts = prompts_of(*lengths)
    options = {"max_new_tokens": 6, "recurrence": 8, "exit": exit, "sampling": sampling}
    together, totals = generate(model, prompts, seeds=range(8), **options)
    if exit is not None:
        assert len({tuple(row.steps) for row in together}) > 3
        assert totals.computed > totals.used > 8 * 5  # frozen rows are computed along
    alone = [generate(model, [prompts[row]], seeds=[row], **options)[0][0] for row in range(8)]
    monkeypatch.setattr(decode, "PROMPT_MULTIPLE", 1)
    alone += [generate(model, [prompts[row]], seeds=[row], **options)[0][0] for row in ((2,) if exit else (2, 5))]
    for one, many in zip(alone, [*together, together[2], together[5]], strict=False):
        assert (one.tokens, one.steps) == (many.tokens, many.steps)
        np.testing.assert_allclose(one.logprobs, many.logprobs, rtol=1e-10)


@pytest.mark.parametrize(
    ("policy", "budget", "exit"),
    [
        ("full", 0, Exit("kl", 0.03)),
        ("full", 0, Exit("acceleration", 0.3)),
        ("full", 0, Exit("argmax-stability", 2, every=2)),
        ("full", 0, Exit("cosine", 0.02, min_steps=4)),
        ("mod", 3, None),
        ("mod", 3, Exit("latent-diff", 0.15)),
        ("mod", 2, Exit("minp-kl", 0.03)),
        ("last", 0, None),
        ("last", 0, Exit("entropy-diff", 0.05)),
        ("last", 0, Exit("kl-entropy", 0.05, entropy=4.0)),
    ],
    ids=lambda value: value.name if isinstance(value, Exit) else str(value),
)
def test_policies_and_exits_mean_what_a_plain_loop_computes(policy, budget, exit):
    """The oracle thinks token by token, in the prompt too, decides step by step and caches nothing."""
    model, (prompt,) = model_of(), prompts_of(9)
    expected = generate_plainly(model, prompt, 7, 8, exit, policy, budget)
    (row,), totals = generate(model, [prompt], max_new_tokens=7, recurrence=8, exit=exit, policy=policy, budget=budget)
    assert (row.tokens, row.steps) == (expected.tokens, expected.steps)
    np.testing.assert_allclose(row.logprobs, expected.logprobs, rtol=1e-10)
    assert totals.prompt_used == sum(expected.prompt_steps)
    assert totals.used == sum(expected.steps[1:])
    if exit is not None:
        assert len(set(expected.steps + expected.prompt_steps)) > 1


@pytest.mark.parametrize("exit", [None, Exit("latent-diff", 0.15)], ids=["fixed", "exits"])
def test_a_warm_start_begins_where_the_last_token_ended(exit):
    model, (prompt,) = model_of(), prompts_of(9)
    warm, cold = (generate_plainly(model, prompt, 7, 4, exit, warm_start=each) for each in (True, False))
    (row,), _ = generate(model, [prompt], max_new_tokens=7, recurrence=4, exit=exit, warm_start=True)
    assert (row.tokens, row.steps) == (warm.tokens, warm.steps)
    np.testing.assert_allclose(row.logprobs, warm.logprobs, rtol=1e-10)
    assert row.logprobs[0] == pytest.approx(cold.logprobs[0], rel=1e-10)  # the prompt starts as always
    assert not np.allclose(row.logprobs[1:], cold.logprobs[1:], rtol=1e-3)


def test_a_stop_token_the_length_and_the_context_end_a_row():
    model, prompts = model_of(), prompts_of(5, 126)
    (first, second), _ = generate(model, prompts, max_new_tokens=8, recurrence=2)
    assert (first.finish_reason, second.finish_reason) == ("length", "context")
    assert len(second.tokens) == 128 - 126
    stop = first.tokens[2]
    (row,), _ = generate(model, prompts[:1], max_new_tokens=8, recurrence=2, stop_tokens=[stop])
    assert row.tokens == first.tokens[: first.tokens.index(stop) + 1]
    assert row.finish_reason == "eos"


def test_streaming_gives_the_same_tokens_and_may_end_a_row():
    model, prompts = model_of(), prompts_of(5, 9)
    whole, _ = generate(model, prompts, max_new_tokens=9, recurrence=2)
    seen: dict[int, list[int]] = {0: [], 1: []}

    def on_tokens(row, tokens):
        kept = max(4 - len(seen[row]), 0) if row == 1 and len(seen[row]) + len(tokens) >= 4 else None
        seen[row] += tokens[:kept]
        return kept

    streamed, _ = generate(model, prompts, max_new_tokens=9, recurrence=2, on_tokens=on_tokens, tokens_per_call=4)
    assert seen[0] == streamed[0].tokens == whole[0].tokens
    assert seen[1] == streamed[1].tokens == whole[1].tokens[:4]
    assert streamed[1].finish_reason == "stop"


def test_impossible_prompts_and_caches_are_refused_with_the_numbers():
    model = model_of()
    for prompt, words in [([], "is empty"), ([1] * 128, "128 tokens"), ([96], "vocabulary of 96")]:
        with pytest.raises(UserError, match=words):
            generate(model, [prompt])
    with pytest.raises(UserError, match=r"6 slots takes 0.000918 GB and 1e-06 GB are free"):
        generate(model, prompts_of(5), memory_limit=1000)
