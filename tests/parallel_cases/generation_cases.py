"""Generation on two devices is generation on one, and drops no token whatever `parallel.dispatch` training had."""

import jax
import numpy as np

from jax_huginn.inference import Exit, Schedule, generate
from tests.generation_support import model_of, prompts_of


def test_two_devices_write_what_one_writes():
    prompts = prompts_of(3, 40, 17)  # a place of the second device stays empty
    lockstep = Schedule(one_in=1)
    options = {"max_new_tokens": 6, "recurrence": 8, "exit": Exit("latent-diff", 0.15), "schedule": lockstep}
    dropping = {"dispatch": "all_to_all", "data": 1, "capacity_factor": 0.1}
    one, spent_by_one = generate(model_of("core"), prompts, **options)
    two, spent_by_two = generate(model_of("core", parallel=dropping), prompts, devices=jax.devices()[:2], **options)
    for row, other in zip(one, two, strict=True):
        assert (row.tokens, row.steps, row.finish_reason) == (other.tokens, other.steps, other.finish_reason)
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-12)
    assert len({tuple(row.steps) for row in one}) == 3
    assert spent_by_one.used == spent_by_two.used
    assert spent_by_one.computed > spent_by_two.computed  # a device does not wait for the other's slower rows
