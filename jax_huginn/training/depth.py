"""How many recurrences a micro-batch gets: the scheme "poisson-lognormal-filling" (arXiv 2502.05171, section 3.3).

    tau ~ Normal(log r - 1/8, 1/2);  p ~ Poisson(exp tau) + 1;  n = max(p - k_max, 0);  k = min(p, k_max)

Drawn on the host from (seed, micro-batch) alone, hence the same on every process: a mismatch would hang collectives.
"""

import math

import numpy as np

from jax_huginn.config.schema import RecurrenceConfig

SIGMA = 0.5
"""Std of tau; its mean is lowered by SIGMA^2 / 2, so that exp(tau) has mean r."""
_PHILOX_KEY = 0x6465707468
"""Separates these draws from others made with the same seed ("depth" in ASCII)."""


def sample_depth(config: RecurrenceConfig, seed: int, micro_batch: int) -> tuple[int, int]:
    """(n, k): recurrences without and with gradient, k >= 1, of micro-batch number `micro_batch`, counted from 0."""
    no_grad_mean, backprop_depth = max(config.mean - config.backprop_depth, 0), config.backprop_depth
    progress = min(micro_batch / config.curriculum, 1.0) if config.curriculum else 1.0
    no_grad_mean = math.ceil(progress * no_grad_mean)
    backprop_depth = max(math.ceil(progress * backprop_depth), 1)
    if config.scheme == "fixed":
        total = min(config.mean, no_grad_mean + backprop_depth)
    else:
        generator = np.random.Generator(np.random.Philox(key=[seed, _PHILOX_KEY], counter=[0, 0, 0, micro_batch]))
        tau = generator.normal(math.log(no_grad_mean + backprop_depth) - SIGMA**2 / 2, SIGMA)
        total = int(generator.poisson(math.exp(tau))) + 1
    return max(total - backprop_depth, 0), min(total, backprop_depth)


def sample_depths(config: RecurrenceConfig, seed: int, step: int, micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """n and k of each micro-batch of optimiser step `step` (counted from 0), two int32 arrays (micro_batches,).

    NumPy int32 rather than Python ints, which are weakly typed and would cost the jitted step a second trace.
    """
    first = step * micro_batches
    draws = [sample_depth(config, seed, first + index) for index in range(micro_batches)]
    n_M, k_M = np.array(draws, dtype=np.int32).T
    return n_M, k_M
