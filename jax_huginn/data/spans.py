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


class Spans:
    """The parts of files that each of `streams` streams reads in each epoch: a pure function of sizes and seed."""

    def __init__(self, files: Sequence[CorpusFile], seed: int, streams: int = 1) -> None:
        self.files, self.streams, self._seed = list(files), streams, seed
        self._sizes = np.array([file.bytes_to_read for file in files], np.int64)

    def parts(self, stream: int, epoch: int) -> list[CorpusFile]:
        """The files of a span, in order; the first and the last may be cut. Empty if there are fewer bytes than spans.

        A file without bytes (damaged, but its reader says so) lies in one span too.
        """
        order = permutation(len(self.files), self._seed, EPOCH, 0, epoch)
        sizes = self._sizes[order]
        ends = np.cumsum(sizes)
        begins, total = ends - sizes, int(ends[-1])
        span = permutation(self.streams, self._seed, SPANS, epoch)[stream]
        low, high = total * span // self.streams, total * (span + 1) // self.streams
        inside = ((ends > low) | (begins >= low)) & ((begins < high) | (high == total))
        parts = []
        for index in np.flatnonzero(inside).tolist():
            begin, size = int(begins[index]), int(sizes[index])
            share = (max(low - begin, 0), min(high - begin, size))
            file = self.files[order[index]]
            parts.append(file if share == (0, size) else replace(file, share=share))
        return parts
