"""Generation on several devices is generation on one, and drops no token whatever `parallel.dispatch` training had."""

import jax
import numpy as np
import pytest
from flax import nnx

from eval_tasks.language_model import Reading
from jax_huginn.config.checks import UserError
from jax_huginn.inference import Drafts, Exit, Sampling, Schedule, generate, programs
from jax_huginn.inference.evaluation import JaxLanguageModel
from jax_huginn.model import functional
from jax_huginn.model.sharding import shardings
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


@pytest.mark.parametrize(
    ("kind", "devices", "fsdp", "options"),
    [
        ("core", 8, 4, {"exit": Exit("latent-diff", 0.4)}),
        ("injection", 4, 2, {"drafts": Drafts(2, 2), "sampling": Sampling(temperature=0.7)}),
    ],
)
def test_weights_in_parts_write_what_whole_ones_write(kind, devices, fsdp, options):
    """Groups of `fsdp` devices, each with a copy of the weights: beside others where there are more devices."""
    model, prompts = model_of(kind), prompts_of(3, 20, 17)
    options = {"max_new_tokens": 4, "recurrence": 4, **options}
    one, _ = generate(model, prompts, **options)
    graphdef, params = functional.split(model)
    mesh = programs.mesh_of(model.config, jax.devices()[:devices], fsdp)
    params = jax.device_put(params, shardings(params, mesh))
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.size > 500]  # norms and biases are on every device
    assert all(fsdp * leaf.addressable_shards[0].data.size == leaf.size for leaf in matrices)
    many, _ = generate(nnx.merge(graphdef, params), prompts, devices=jax.devices()[:devices], fsdp=fsdp, **options)
    for row, other in zip(one, many, strict=True):
        assert (row.tokens, row.steps, row.finish_reason) == (other.tokens, other.steps, other.finish_reason)
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-10)


def test_devices_that_weights_cannot_be_spread_over_are_refused():
    model, prompts = model_of(), prompts_of(5)
    for count, fsdp, words in [(8, 3, "parallel.fsdp=3 does not divide the 8"), (7, 7, "model.width=32 must be")]:
        with pytest.raises(UserError, match=words):
            generate(model, prompts, devices=jax.devices()[:count], fsdp=fsdp)


def test_two_devices_score_as_one_does():
    readings = [Reading(tuple(tokens), (tuple(tokens[-2:]), (7,))) for tokens in prompts_of(3, 40, 17)]
    one, two = (
        JaxLanguageModel(model_of("core"), Exit("latent-diff", 0.15), devices=jax.devices()[:count]) for count in (1, 2)
    )
    for scores, others in zip(*(model.log_probabilities(readings, 8) for model in (one, two)), strict=True):
        for score, other in zip(scores, others, strict=True):
            np.testing.assert_allclose(score.log_probabilities, other.log_probabilities, rtol=1e-12)
            assert score.used == other.used
