"""Rows that think at their own pace write what they write in lockstep, and the device runs what the schedule says."""

import numpy as np
import pytest

from benchmarks.schedule import simulate
from jax_huginn.config.checks import UserError
from jax_huginn.inference import Exit, Schedule, generate
from tests.generation_oracle import generate_plainly
from tests.generation_support import model_of, prompts_of

NEW, MOST = 12, 8
LOCKSTEP = Schedule(one_in=1)


@pytest.mark.parametrize(
    ("policy", "budget", "exit", "schedule"),
    [
        ("full", 0, None, Schedule()),
        ("last", 0, None, Schedule(width=3, one_in=2)),
        ("full", 0, Exit("kl", 0.03, every=3), Schedule(width=5)),
        ("mod", 3, Exit("latent-diff", 0.15), Schedule(one_in=4)),
    ],
    ids=["full, by a table", "last, by a table, warm", "full, kl", "mod, latent-diff"],
)
def test_rows_at_their_own_pace_write_what_they_write_in_lockstep(policy, budget, exit, schedule):
    """Rows end at stop tokens, the context or the length, so at different times. The device runs what the simulation of
    the schedule runs, and saves what that saves."""
    model, prompts = model_of(model={"max_length": 64}), prompts_of(9, 57, 3, 17, 1, 8, 30, 5)
    limits = np.random.default_rng(1).geometric(0.3, (len(prompts), NEW)).clip(1, MOST) if exit is None else None
    warm_start = policy == "last"
    options = {
        "max_new_tokens": NEW, "recurrence": MOST, "exit": exit, "policy": policy, "budget": budget, "limits": limits,
        "warm_start": warm_start, "stop_tokens": range(0, 96, 16),
    }  # fmt: skip
    rows, in_lockstep = generate(model, prompts, schedule=LOCKSTEP, **options)
    again, totals = generate(model, prompts, schedule=schedule, **options)
    assert len({len(row.tokens) for row in rows}) > 2
    assert_same(again, rows)
    assert totals.used == in_lockstep.used == sum(sum(row.steps[1:]) for row in rows)
    assert totals.computed < (0.75 if exit is None else 1) * in_lockstep.computed
    for rule, spent in ((LOCKSTEP, in_lockstep), (schedule, totals)):
        steps, width = [row.steps[1:] for row in rows], rule.width or len(rows)
        run = simulate(steps, width, rule.one_in, 1 if exit is None else exit.every)
        assert (spent.core_runs, spent.readouts, spent.computed) == run

    if limits is not None:
        for row, prompt, limit in zip(rows, prompts, limits.tolist(), strict=True):
            plain = generate_plainly(model, prompt, len(row.tokens), MOST, None, policy, budget, warm_start, limit)
            assert (row.tokens, row.steps) == (plain.tokens, plain.steps)
            np.testing.assert_allclose(row.logprobs, plain.logprobs, rtol=1e-10)

    streamed = [[] for _ in rows]

    def on_tokens(row, tokens):
        kept = 1 if row == 3 else None
        streamed[row] += tokens[:kept]
        return kept

    ended, _ = generate(model, prompts, schedule=schedule, on_tokens=on_tokens, tokens_per_call=2, **options)
    assert [row.tokens for row in ended] == streamed
    assert_same([*ended[:3], *ended[4:]], [*rows[:3], *rows[4:]])
    assert (ended[3].tokens, ended[3].finish_reason) == (rows[3].tokens[:1], "stop")


def test_impossible_schedules_and_limits_are_refused():
    model, prompts = model_of(), prompts_of(5)
    for options, words in [
        ({"schedule": Schedule(width=-1)}, "width=-1"),
        ({"schedule": Schedule(one_in=0)}, "one_in=0"),
        ({"limits": np.ones((1, 3), int)}, r"shape \(1, 3\), not \(1, 4\)"),
        ({"limits": np.full((1, 4), 9)}, "from 9 to 9 must lie in"),
    ]:
        with pytest.raises(UserError, match=words):
            generate(model, prompts, max_new_tokens=4, recurrence=MOST, **options)


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one.tokens, one.steps, one.finish_reason) == (other.tokens, other.steps, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-10)
