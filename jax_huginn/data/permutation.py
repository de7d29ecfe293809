"""Seeded orders that are the same on every machine and with every version of NumPy."""

import numpy as np

FILES, EPOCH, WINDOW = range(3)  # purposes of an order; each has its own random numbers


def permutation(count: int, seed: int, *purpose: int) -> list[int]:
    """A seeded order of range(count).

    Sorts raw bits: NumPy promises never to change their sequence, but makes no such promise for
    `Generator.permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, *purpose]))
    return np.argsort(bits.random_raw(count), kind="stable").tolist()
