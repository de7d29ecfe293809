"""Reads rows from files in a seeded order, epoch after epoch, and can resume at any row."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.spans import Spans

FRUITLESS_FILES = 10  # a run stops if its first files, this many, hold no good row
FRUITLESS_ROUNDS = 16  # and where V streams find none in this many times V spans: nearly surely all of the corpus

Pieces = Callable[[CorpusFile, int], Iterator[tuple[int, np.ndarray]]]
"""Reads a file from a piece's offset: yields (offset, items) for each piece."""


class Place(NamedTuple):
    """Where a row begins."""

    epoch: int
    file: int
    """Index in the epoch's span of the stream."""
    piece: int
    """Offset of a piece in the file: a byte of a text file, a row of a parquet file."""
    item: int
    """Token or row within the piece."""


START = Place(0, 0, 0, 0)


class Piece(NamedTuple):
    """Items read at once."""

    place: Place
    """Place of the first item."""
    items: np.ndarray
    skipped: tuple[int, int]
    """Rows and files skipped before it."""


class Watcher(Protocol):
    """Learns which files are read next; the hub's cache fetches them."""

    def opens(self, stream: int, visit: int, files: Sequence[CorpusFile]) -> None:
        """Stream `stream` now reads files[0], in its visit number `visit` (they increase); files[1] comes next."""


class RowReader:
    """The rows of one stream: `take` items each, `stride` apart, across the borders of pieces, files and epochs.

    Packed text: items are tokens, take S + 1, stride S. Parquet: an item is a row, take 1, stride 1.
    """

    def __init__(
        self,
        spans: Spans,
        pieces: Pieces,
        take: int,
        stride: int,
        stream: int,
        bad: BadData | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """
        Args:
            bad: counts what `pieces` skips.
        """
        self._spans, self._pieces, self._take, self._stride = spans, pieces, take, stride
        self._stream, self._watcher = stream, watcher
        self._bad = bad or BadData("stop", print)
        self._source: Generator[Piece] | None = None
        self.seek(START)

    def seek(self, place: Place, skipped: tuple[int, int] = (0, 0)) -> None:
        """Make `place` the beginning of the next row. Reads one piece again."""
        epoch, file, piece, self._used = place
        if self._source:
            self._source.close()
        self._source = self._read(epoch, file, piece, skipped)
        self._buffer: deque[Piece] = deque()
        self._held = -self._used  # unused items in the buffer
        self.visit = self._visit(epoch, file)  # number of the current file; later ones have higher numbers

    def announce(self) -> None:
        """Tell the watcher about the next file before it is opened."""
        self._notify(*divmod(self.visit, len(self._spans.files)))

    @property
    def skipped(self) -> tuple[int, int]:
        """Rows and files skipped before the piece in which the next row begins."""
        self._hold(1)
        return self._buffer[0].skipped

    @property
    def place(self) -> Place:
        """Where the next row begins."""
        self._hold(1)
        return self._buffer[0].place._replace(item=self._used)

    def next_row(self) -> np.ndarray:
        """The next row, (S + 1,) int32."""
        self._hold(self._take)
        return self._cut(self._take)

    def epoch_rows(self) -> Iterator[np.ndarray]:
        """The rows of the first epoch. The last packed row may be shorter, but has at least 2 tokens."""
        self.seek(START)
        while True:
            while self._held < self._take and (piece := self._next_piece()).place.epoch == 0:
                self._append(piece)
            if self._held <= self._take - self._stride:
                return
            yield self._cut(min(self._take, self._held))

    def _read(self, epoch: int, first: int, offset: int, skipped: tuple[int, int]) -> Generator[Piece]:
        found = first > 0 or offset > 0
        fruitless = -1 if found or epoch else 0  # files read before the very first row; -1: a row was found
        empty, most = 0, 1 + FRUITLESS_ROUNDS * (self._spans.streams - 1)  # spans without a row, one after another
        rows, files = self._bad.rows - skipped[0], self._bad.files - skipped[1]
        while True:
            parts = self._spans.parts(self._stream, epoch)
            for index in range(first, len(parts)):
                self.visit = self._visit(epoch, index)
                self._notify(epoch, index)
                before = (self._bad.rows - rows, self._bad.files - files)
                for begin, items in self._pieces(parts[index], offset):
                    if len(items):
                        found, fruitless = True, -1
                        skips = (self._bad.rows, self._bad.files)
                        yield Piece(Place(epoch, index, begin, 0), items, before)
                        # While this stream waits, others skip rows too.
                        rows, files = rows + self._bad.rows - skips[0], files + self._bad.files - skips[1]
                    before = (self._bad.rows - rows, self._bad.files - files)
                offset = 0
                if fruitless >= 0 and (fruitless := fruitless + 1) == FRUITLESS_FILES < len(parts):
                    self._stop(parts[:FRUITLESS_FILES])
            empty = 0 if found else empty + 1
            if empty == most:
                self._stop(self._spans.files)
            found, first, epoch = False, 0, epoch + 1

    def _stop(self, files: Sequence[CorpusFile]) -> NoReturn:
        names = ", ".join(str(file.path) for file in files[:3])
        cause = f" ({self._bad.last})" if self._bad.last else ""
        raise DataError(f"no data in {len(files)} file(s), {names}{cause}; fix or remove them")

    def _notify(self, epoch: int, index: int) -> None:
        if self._watcher:
            coming = self._spans.parts(self._stream, epoch)[index : index + 2]
            if len(coming) < 2:
                coming += self._spans.parts(self._stream, epoch + 1)[:1]
            self._watcher.opens(self._stream, self._visit(epoch, index), coming)

    def _visit(self, epoch: int, index: int) -> int:
        return epoch * len(self._spans.files) + index

    def _next_piece(self) -> Piece:
        assert self._source is not None
        return next(self._source)

    def _append(self, piece: Piece) -> None:
        self._buffer.append(piece)
        self._held += len(piece.items)

    def _hold(self, count: int) -> None:
        while self._held < count:
            self._append(self._next_piece())
        self._drop_used()

    def _drop_used(self) -> None:
        while self._buffer and self._used >= len(self._buffer[0].items):
            self._used -= len(self._buffer.popleft().items)

    def _cut(self, take: int) -> np.ndarray:
        parts, missing, begin = [], take, self._used
        for _, items, _ in self._buffer:
            parts.append(items[begin : begin + missing])
            missing -= len(parts[-1])
            begin = max(begin - len(items), 0)
            if not missing:
                break
        stride = min(self._stride, take)
        self._used += stride
        self._held -= stride
        self._drop_used()
        return np.concatenate(parts).reshape(-1)
