"""Speculation changes no text: whatever is drafted, what stays is what plain decoding writes."""

import numpy as np
import pytest

from jax_huginn.config.checks import UserError
from jax_huginn.inference import Drafts, Exit, Sampling, generate
from tests.generation_support import model_of, prompts_of

RECURRENCE, NEW = 6, 17


@pytest.mark.parametrize(
    ("kind", "drafts", "sampling"),
    [
        ("dense", Drafts(3, 2), None),
        ("injection", Drafts(1, 1), None),
        ("core", Drafts(4, 3), Sampling(temperature=0.7, repetition_penalty=1.2)),
        ("grouped heads", Drafts(5, 5), None),
    ],
    ids=lambda value: "sampled" if isinstance(value, Sampling) else "greedy" if value is None else str(value),
)
def test_the_text_is_that_of_plain_decoding(kind, drafts, sampling):
    """Ragged rows accept different numbers of drafts; one ends at the context, one by a stop token."""
    model, prompts = model_of(kind), prompts_of(3, 40, 120)
    options = {"max_new_tokens": NEW, "recurrence": RECURRENCE, "sampling": sampling}
    plain, _ = generate(model, prompts, **options)
    stop = next(token for token in plain[1].tokens[5:] if token not in plain[0].tokens)
    plain, spent = generate(model, prompts, stop_tokens=[stop], **options)
    quick, totals = generate(model, prompts, stop_tokens=[stop], drafts=drafts, **options)
    assert {"length", "context"} < {row.finish_reason for row in plain} | {"length"}
    for one, other in zip(plain, quick, strict=True):
        assert (one.tokens, one.steps, one.finish_reason) == (other.tokens, other.steps, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-10)
    assert (spent.used, spent.drafted) == (totals.used, 0)
    assert 0 < totals.accepted < totals.drafted  # both happen
    assert totals.readouts < spent.readouts * (drafts.number + 1)


def test_streaming_and_ends_work_as_without_drafts():
    model, (prompt,) = model_of(), prompts_of(9)
    whole, _ = generate(model, [prompt], max_new_tokens=NEW, recurrence=RECURRENCE)
    seen: list[int] = []

    def on_tokens(row, tokens):
        kept = 10 - len(seen) if len(seen) + len(tokens) >= 10 else None
        seen.extend(tokens[:kept])
        return kept

    (row,), _ = generate(
        model, [prompt], max_new_tokens=NEW, recurrence=RECURRENCE, drafts=Drafts(3, 2), on_tokens=on_tokens,
        tokens_per_call=1,
    )  # fmt: skip
    assert seen == row.tokens == whole[0].tokens[:10]
    assert row.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drafts": Drafts(0, 2)}, r"speculate=0 must lie in \[1, 16\]"),
        ({"drafts": Drafts(4, 6)}, r"draft_recurrence=6 must lie in \[1, 5\], below recurrence=6"),
        ({"exit": Exit("kl")}, "a fixed depth: leave out exit=kl"),
        ({"limits": np.full((1, 4), 3)}, "a fixed depth: leave out limits"),
        ({"policy": "last"}, "cache.policy=full, not last"),
        ({"warm_start": True}, "cannot have a warm start"),
    ],
)
def test_what_would_change_the_text_is_refused(options, words):
    with pytest.raises(UserError, match=words) as error:
        generate(model_of(), prompts_of(5), max_new_tokens=4, recurrence=6, **{"drafts": Drafts(4, 2), **options})
    assert "\n" not in str(error.value)
