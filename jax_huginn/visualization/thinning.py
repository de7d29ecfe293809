"""Fewer points for the same picture: a page of 100,000 steps has to open at once."""

from itertools import pairwise

import numpy as np

POINTS = 2000  # of a curve; a screen is no wider
COLUMNS = 300  # of a heat map


def extremes(y: np.ndarray, most: int = POINTS) -> np.ndarray:
    """Indices, ascending, of at most `most` points: the smallest and the largest of equal parts, the first, the last.

    A spike of one step stays visible, which would be lost if every n-th point were kept.
    """
    if y.size <= most:
        return np.arange(y.size)
    edges = np.linspace(0, y.size, (most - 2) // 2 + 1).astype(int)
    kept = {0, y.size - 1}
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    for start, end in pairwise(edges):
        kept |= {start + int(low[start:end].argmin()), start + int(high[start:end].argmax())}
    return np.array(sorted(kept))


def every_nth(count: int, most: int = POINTS) -> np.ndarray:
    """At most `most` evenly spaced indices, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` values around each value, NaN left out; of fewer at the ends."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(np.arange(y.size) - window // 2, 0)
    end = np.minimum(np.arange(y.size) + window // 2 + 1, y.size)
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def averaged(values: np.ndarray, most: int = COLUMNS) -> np.ndarray:
    """Means over equal runs of neighbours along the first axis, at most `most` of them."""
    edges = np.linspace(0, len(values), min(len(values), most) + 1).astype(int)
    return np.stack([values[start:end].mean(axis=0) for start, end in pairwise(edges)])
