"""Seeded orders that stay the same on every machine and with every version of NumPy."""

import numpy as np

FILES, EPOCH, WINDOW = range(3)  # what an order is for; keeps their random numbers apart


def permutation(count: int, seed: int, *purpose: int) -> list[int]:
    """A seeded order of range(count).

    From raw bits, whose sequence NumPy promises never to change, unlike that of `Generator.permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, *purpose]))
    return np.argsort(bits.random_raw(count), kind="stable").tolist()
