"""Cached generation is the uncached model; rows do not depend on their batch; policies and exits do what they say."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.config.checks import UserError
from jax_huginn.inference import Exit, Sampling, generate
from jax_huginn.model.huginn import MoEHuginnModel
from tests.support import small_config

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
KINDS = {
    "dense": {"moe": {"experts": 0}},
    "injection": {"moe": {"placement": "injection"}},
    "core": {"moe": {"placement": "core"}},
    "grouped heads": {"moe": {"experts": 0}, "model": {"kv_heads": 2}},
}


def model_of(kind: str = "dense", dtype: str = "float64") -> MoEHuginnModel:
    sections = KINDS[kind]
    types = {"dtype": dtype, "param_dtype": dtype}
    model = MoEHuginnModel(small_config(**{**sections, "model": sections.get("model", {}) | types}))
    rng = np.random.default_rng(1)
    for block in (*model.prelude, *model.core, *model.coda):  # a bias of zero would hide a mistake
        bias = block.attn.qk_bias
        bias[...] = jnp.asarray(0.5 * rng.standard_normal(bias[...].shape), bias[...].dtype)
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, length).tolist() for length in lengths]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(kind, dtype, tolerance):
    """Greedy tokens, and their log-probabilities by one pass over the whole text."""
    model, recurrence = model_of(kind, dtype), 5
    (row,), totals = generate(model, prompts_of(40), max_new_tokens=12, recurrence=recurrence)
    text = jnp.asarray([row.prompt + row.tokens])
    logits = np.asarray(model(text[:, :-1], (recurrence, 0)).logits[0, 39:], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert row.tokens == log_p.argmax(-1).tolist()
    np.testing.assert_allclose(row.logprobs, log_p.max(-1), rtol=tolerance, atol=tolerance)
    assert row.steps == [recurrence] * 12
    assert row.finish_reason == "length"
    assert totals.used == totals.computed == 11 * recurrence  # the last token is not computed


@pytest.mark.parametrize("exit", [None, Exit("latent-diff", 0.2), Exit("kl", 1e-3)], ids=["fixed", "state", "kl"])
def test_a_row_alone_is_the_row_in_its_batch(exit):
    """Eight ragged prompts with different exits, sampled with seeds of their own."""
    model, prompts = model_of("injection"), prompts_of(3, 40, 17, 1, 33, 8, 64, 25)
    options = {"max_new_tokens": 6, "recurrence": 8, "exit": exit, "sampling": Sampling(temperature=0.8)}
    together, _ = generate(model, prompts, seeds=range(8), **options)
    for seed in (0, 2, 6):
        (alone,), _ = generate(model, [prompts[seed]], seeds=[seed], **options)
        assert (alone.tokens, alone.steps) == (together[seed].tokens, together[seed].steps)
        np.testing.assert_allclose(alone.logprobs, together[seed].logprobs, rtol=1e-10)


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
