"""Seeded random numbers and orders that are the same on every machine and with every version of NumPy."""

import numpy as np

SPANS, EPOCH, WINDOW, EXAMPLE, HELD_OUT = range(5)  # purposes; each has its own random numbers


def random_bits(count: int, seed: int, *purpose: int) -> np.ndarray:
    """(count,) uint64.

    NumPy promises never to change the sequence of raw bits, but makes no such promise for `Generator`'s methods.
    """
    return np.random.PCG64(np.random.SeedSequence([seed, *purpose])).random_raw(count)


def permutation(count: int, seed: int, *purpose: int) -> list[int]:
    """A seeded order of range(count)."""
    return np.argsort(random_bits(count, seed, *purpose), kind="stable").tolist()
