"""Equal shares of every epoch for all streams, so that every token is read equally often.

In each epoch the files lie end to end in a new seeded order and are cut into V spans of equal bytes, wherever the cuts
fall. A seeded order gives each stream one span. Sizes of files and the number of streams make no difference then: an
epoch of all streams is the corpus, once. Readers move a cut to the next line or row, on both of its sides alike.

Spans are equal in bytes, so one with more tokens to a byte takes its stream longer. A stream gets another span in every
epoch, so this averages out.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jax_huginn.data.permutation import EPOCH, SPANS, permutation
from jax_huginn.data.sources.files import CorpusFile

LAYOUTS_KEPT = 4  # streams are in different epochs near an epoch's end


class Spans:
    """The parts of files that each of `streams` streams reads in each epoch: a pure function of sizes and seed."""

    def __init__(self, files: Sequence[CorpusFile], seed: int, streams: int = 1) -> None:
        self.files, self.streams, self._seed = list(files), streams, seed
        self._sizes = np.array([file.bytes_to_read for file in files], np.int64)
        self._layouts: dict[int, tuple[list[int], np.ndarray, np.ndarray]] = {}  # the latest ones

    def parts(self, stream: int, epoch: int) -> list[CorpusFile]:
        """The files of a span, in order; the first and the last may be cut. Empty if there are fewer bytes than spans.

        A file without bytes (damaged, but its reader says so) lies in one span too.
        """
        order, begins, sizes = self._laid_out(epoch)
        low, high, indices = self._span(stream, epoch)
        parts = []
        for index in indices:
            begin, size = int(begins[index]), int(sizes[index])
            share = (max(low - begin, 0), min(high - begin, size))
            file = self.files[order[index]]
            parts.append(file if share == (0, size) else replace(file, share=share))
        return parts

    def share_before(self, stream: int, epoch: int, number: int, within: float) -> float:
        """The share of a span's bytes before a place: byte `within` of the whole file whose part is `number`."""
        _, begins, _ = self._laid_out(epoch)
        low, high, indices = self._span(stream, epoch)
        if number >= len(indices) or high == low:
            return 0.0
        return min(max(float(begins[indices[number]]) + within - low, 0.0) / (high - low), 1.0)

    def _span(self, stream: int, epoch: int) -> tuple[int, int, list[int]]:
        """Begin and end of a stream's span, and its files' indices in the epoch's order."""
        _, begins, sizes = self._laid_out(epoch)
        ends, total = begins + sizes, int(self._sizes.sum())
        span = permutation(self.streams, self._seed, SPANS, epoch)[stream]
        low, high = total * span // self.streams, total * (span + 1) // self.streams
        inside = ((ends > low) | (begins >= low)) & ((begins < high) | (high == total))
        return low, high, np.flatnonzero(inside).tolist()

    def _laid_out(self, epoch: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The order of an epoch's files, where each begins, and their sizes."""
        if epoch not in self._layouts:
            order = permutation(len(self.files), self._seed, EPOCH, 0, epoch)
            sizes = self._sizes[order]
            layout = order, np.cumsum(sizes) - sizes, sizes
            self._layouts = dict([*self._layouts.items(), (epoch, layout)][-LAYOUTS_KEPT:])
            return layout
        return self._layouts[epoch]
