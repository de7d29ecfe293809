"""The depth sampler against the figures of the public implementation (200 000 draws, r = 32, k_max = 8)."""

import numpy as np
import pytest

from jax_huginn.config.schema import RecurrenceConfig
from jax_huginn.training.depth import sample_depth, sample_depths

DRAWS = 40_000


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    config = RecurrenceConfig(mean=32, backprop_depth=8)
    return np.array([sample_depth(config, 7, index) for index in range(DRAWS)])


def test_distribution_is_that_of_the_public_sampler(draws):
    n, k = draws.T
    total = n + k
    # Standard errors at 40 000 draws: mean 0.09, std about 0.12, share 0.06 %, quantiles within a step or two.
    assert total.mean() == pytest.approx(33.0, abs=0.4)
    assert total.std() == pytest.approx(18.1, abs=0.5)
    assert (total <= 8).mean() == pytest.approx(0.014, abs=0.003)
    assert n.mean() == pytest.approx(25.0, abs=0.4)
    assert k.mean() == pytest.approx(7.98, abs=0.01)
    quantiles = np.quantile(total, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    assert np.all(np.abs(quantiles - [8, 12, 20, 29, 41, 67, 94]) <= [1, 1, 1, 1, 1, 2, 4])


def test_gradient_steps_are_filled_first(draws):
    n, k = draws.T
    assert np.all(k[n > 0] == 8)
    assert k.min() >= 1


def test_a_draw_depends_on_seed_and_micro_batch_alone():
    config = RecurrenceConfig(mean=32, backprop_depth=8)
    forward = [sample_depth(config, 3, index) for index in range(50)]
    assert [sample_depth(config, 3, index) for index in reversed(range(50))] == forward[::-1]
    assert [sample_depth(config, 4, index) for index in range(50)] != forward
    n_U, k_U = sample_depths(config, 3, step=12, micro_batches=4)
    assert list(zip(n_U.tolist(), k_U.tolist(), strict=True)) == forward[48:] + [
        sample_depth(config, 3, index) for index in (50, 51)
    ]
    assert n_U.dtype == k_U.dtype == np.int32


def test_in_lockstep_all_micro_batches_of_a_step_share_a_draw():
    config = RecurrenceConfig(mean=32, backprop_depth=8, lockstep=True)
    steps = [sample_depths(config, 3, step, micro_batches=4) for step in range(20)]
    for step, (n_U, k_U) in enumerate(steps):
        assert set(zip(n_U.tolist(), k_U.tolist(), strict=True)) == {sample_depth(config, 3, step)}
    assert len({int(n_U[0]) for n_U, _ in steps}) > 10


def test_shallow_means_keep_the_backpropagation_depth():
    """tau uses log max(r, k_max), so a mean below k_max does not lower the depth."""
    config = RecurrenceConfig(mean=2, backprop_depth=8)
    total = np.array([sum(sample_depth(config, 0, index)) for index in range(4000)])
    assert total.mean() == pytest.approx(9.0, abs=0.3)


def test_fixed_scheme():
    assert sample_depth(RecurrenceConfig(mean=32, backprop_depth=8, scheme="fixed"), 0, 5) == (24, 8)
    assert sample_depth(RecurrenceConfig(mean=3, backprop_depth=8, scheme="fixed"), 0, 5) == (0, 3)


def test_curriculum_ramps_depth_and_backpropagation():
    config = RecurrenceConfig(mean=32, backprop_depth=8, scheme="fixed", curriculum=100)
    assert sample_depth(config, 0, 0) == (0, 1)
    assert sample_depth(config, 0, 50) == (12, 4)
    assert sample_depth(config, 0, 100) == sample_depth(config, 0, 10_000) == (24, 8)
    sampled = RecurrenceConfig(mean=32, backprop_depth=8, curriculum=1000)
    early = np.array([sample_depth(sampled, seed, 10) for seed in range(500)])
    assert early[:, 1].max() == 1
