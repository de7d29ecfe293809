"""Sampled number of recurrences: "poisson-lognormal-filling" (arXiv 2502.05171, section 3.3).

    tau ~ Normal(log r - 1/8, 1/2);  p ~ Poisson(exp tau) + 1;  n = max(p - k_max, 0);  k = min(p, k_max)

Drawn on the host from (seed, number of the draw) alone, so all processes agree; a mismatch would deadlock collectives.
"""

import math

import numpy as np

from jax_huginn.config.schema import RecurrenceConfig

SIGMA = 0.5
"""Std of tau; its mean is lowered by SIGMA^2 / 2, so that exp(tau) has mean r."""
_PHILOX_KEY = 0x6465707468
"""Distinguishes these draws from others with the same seed; "depth" in ASCII."""


def sample_depth(config: RecurrenceConfig, seed: int, draw: int) -> tuple[int, int]:
    """(n, k), recurrences without and with gradient, k >= 1, of draw number `draw`, counted from 0.

    A draw belongs to a micro-batch or, with `recurrence.lockstep`, to a step.
    """
    no_grad_mean, backprop_depth = max(config.mean - config.backprop_depth, 0), config.backprop_depth
    progress = min(draw / config.curriculum, 1.0) if config.curriculum else 1.0
    no_grad_mean = math.ceil(progress * no_grad_mean)
    backprop_depth = max(math.ceil(progress * backprop_depth), 1)
    if config.scheme == "fixed":
        total = min(config.mean, no_grad_mean + backprop_depth)
    else:
        generator = np.random.Generator(np.random.Philox(key=[seed, _PHILOX_KEY], counter=[0, 0, 0, draw]))
        tau = generator.normal(math.log(no_grad_mean + backprop_depth) - SIGMA**2 / 2, SIGMA)
        total = int(generator.poisson(math.exp(tau))) + 1
    return max(total - backprop_depth, 0), min(total, backprop_depth)


def sample_depths(config: RecurrenceConfig, seed: int, step: int, micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """n and k of the micro-batches of step `step`, counted from 0: two int32 arrays (U,).

    NumPy int32, because Python ints are weakly typed and would make the jitted step trace a second time.
    """
    if config.lockstep:
        draws = [sample_depth(config, seed, step)] * micro_batches
    else:
        draws = [sample_depth(config, seed, step * micro_batches + index) for index in range(micro_batches)]
    n_U, k_U = np.array(draws, dtype=np.int32).T
    return n_U, k_U
