"""The order of the data: `data.streams` virtual streams (V), a pure function of files, settings and seed.

Row j of the training sequence comes from stream j mod V, whatever the number of threads, processes or devices. Stream i
owns the files i, i + V, ... of the seeded order of files and reads them endlessly, each epoch in a new seeded order:
documents -> `BOS text EOS` tokens -> rows of S + 1 tokens with stride S (a row's last token is the next one's first, so
that every token but a stream's first is a label once an epoch) -> shuffled within windows of `data.shuffle_window`
rows. Parquet rows are taken as they are. What is left of an epoch's tokens begins the row that runs into the next
epoch; windows end with the epoch in which their rows begin. Fewer files than V make as many streams as files.

A position is (epoch, file within the epoch's order, piece within the file, token or row within the piece). A stream's
state is a window's number, the position where it starts and the rows taken from it; restoring reads that window again.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jax_huginn.data.order import EPOCH, FILES, WINDOW, permutation
from jax_huginn.data.sources import DataError, TextFile

Position = tuple[int, int, int, int]
Pieces = Callable[[TextFile, int], Iterator[tuple[int, np.ndarray]]]


class RowReader:
    """Rows of `take` items, `stride` apart, from the pieces of some files in a seeded order, epoch after epoch.

    Packed text: items are tokens, take S + 1, stride S. Parquet: an item is a row, take 1, stride 1.
    """

    def __init__(
        self, files: Sequence[TextFile], pieces: Pieces, take: int, stride: int, seed: int, stream: int
    ) -> None:
        self._files, self._pieces, self._take, self._stride = files, pieces, take, stride
        self._seed, self._stream = seed, stream
        self.seek((0, 0, 0, 0))

    def seek(self, position: Position) -> None:
        """Makes `position` the next row's first item; costs the reading of one piece."""
        epoch, file, piece, self._used = position
        self._source = self._read(epoch, file, piece)
        self._buffer: deque[tuple[tuple[int, int, int], np.ndarray]] = deque()
        self._held = -self._used  # items in the buffer that are not used up

    @property
    def position(self) -> Position:
        """Where the next row begins."""
        self._hold(1)
        return (*self._buffer[0][0], self._used)

    def next_row(self) -> np.ndarray:
        """The next row, (S + 1,) int32."""
        self._hold(self._take)
        return self._cut(self._take)

    def epoch_rows(self) -> Iterator[np.ndarray]:
        """The rows of the first epoch alone; packed, the last one may be shorter, and never has fewer than 2 tokens."""
        self.seek((0, 0, 0, 0))
        while True:
            while self._held < self._take and (piece := next(self._source))[0][0] == 0:
                self._append(piece)
            if self._held <= self._take - self._stride:
                return
            yield self._cut(min(self._take, self._held))

    def _read(self, epoch: int, place: int, offset: int) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
        found = place > 0 or offset > 0  # an epoch that is read from its beginning must hold something
        while True:
            order = permutation(len(self._files), self._seed, EPOCH, self._stream, epoch)
            for index in range(place, len(order)):
                for begin, items in self._pieces(self._files[order[index]], offset):
                    found = found or len(items) > 0
                    if len(items):
                        yield (epoch, index, begin), items
                offset = 0
            if not found:
                names = ", ".join(str(file.path) for file in self._files[:3])
                raise DataError(
                    f"{len(self._files)} file(s) hold no data: {names}; take them out or lower data.streams"
                )
            found, place, epoch = False, 0, epoch + 1

    def _append(self, piece: tuple[tuple[int, int, int], np.ndarray]) -> None:
        self._buffer.append(piece)
        self._held += len(piece[1])

    def _hold(self, count: int) -> None:
        while self._held < count:
            self._append(next(self._source))
        self._drop_used()

    def _drop_used(self) -> None:
        while self._buffer and self._used >= len(self._buffer[0][1]):
            self._used -= len(self._buffer.popleft()[1])

    def _cut(self, take: int) -> np.ndarray:
        parts, missing, begin = [], take, self._used
        for _, items in self._buffer:
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


class Stream:
    """A reader's rows, shuffled within windows.

    While one window is handed out the next is read, a row for a row: no window's end makes training wait.
    """

    def __init__(self, reader: RowReader, window_rows: int, seed: int, stream: int) -> None:
        self._reader, self._window_rows, self._seed, self._stream = reader, window_rows, seed, stream
        self.set_state([0, 0, 0, 0, 0, 0])

    def get_state(self) -> list[int]:
        """[window, epoch, file, piece, item, rows taken from the window]."""
        return [self._window, *self._start, self._taken]

    def set_state(self, state: list[int]) -> None:
        self._window, epoch, file, piece, item, self._taken = state
        self._start = self._coming_start = (epoch, file, piece, item)
        self._rows: list[np.ndarray] | None = None  # the window that is handed out, once it is read
        self._coming: list[np.ndarray] = []  # what is read of the following one
        self._reader.seek(self._start)

    def next_row(self) -> np.ndarray:
        """The next row, (S + 1,) int32."""
        if self._rows is None:
            self._read_ahead(self._window_rows)
            order = permutation(len(self._coming), self._seed, WINDOW, self._stream, self._window)
            self._rows, self._coming = [self._coming[index] for index in order], []
            self._coming_start = self._reader.position
        row = self._rows[self._taken]
        self._taken += 1
        left = len(self._rows) - self._taken
        self._read_ahead(-(-(self._window_rows - len(self._coming)) // (left + 1)))
        if not left:
            self._window, self._start, self._taken, self._rows = self._window + 1, self._coming_start, 0, None
        return row

    def _read_ahead(self, count: int) -> None:
        """Reads up to `count` rows of the coming window; it ends with its epoch."""
        for _ in range(min(count, self._window_rows - len(self._coming))):
            if self._coming and self._reader.position[0] != self._coming_start[0]:
                return
            self._coming.append(self._reader.next_row())


class RowDataset(grain.IterDataset):
    """The endless training sequence of rows, (S + 1,) int32."""

    def __init__(
        self,
        files: Sequence[TextFile],
        pieces: Pieces,
        *,
        take: int,
        stride: int,
        seed: int,
        streams: int,
        shuffle_window: int,
        settings: dict[str, Any],
    ) -> None:
        """`settings`: whatever else fixes the order; a state is refused where they differ."""
        super().__init__()
        self._files, self._pieces, self._take, self._stride = list(files), pieces, take, stride
        self._seed, self._window = seed, shuffle_window
        self._streams = min(streams, len(self._files))
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.relative_path}\0{file.begin}\0{file.end}\0{file.path.stat().st_size}\n".encode())
        self._order = {
            "seed": seed,
            "streams": self._streams,
            "shuffle_window": shuffle_window,
            "files": f"{len(self._files)} files, {digest.hexdigest()[:16]}",
            **settings,
        }

    def __iter__(self) -> "RowIterator":
        order = permutation(len(self._files), self._seed, FILES)
        streams = []
        for index in range(self._streams):
            files = [self._files[place] for place in order[index :: self._streams]]
            reader = RowReader(files, self._pieces, self._take, self._stride, self._seed, index)
            streams.append(Stream(reader, self._window, self._seed, index))
        return RowIterator(streams, self._order)


class RowIterator(grain.DatasetIterator):
    """Deals the streams' rows in turn."""

    def __init__(self, streams: list[Stream], order: dict[str, Any]) -> None:
        super().__init__()
        self._streams, self._order, self._count = streams, order, 0

    def __next__(self) -> np.ndarray:
        row = self._streams[self._count % len(self._streams)].next_row()
        self._count += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """Rows handed out and where each stream stands: less than 100 bytes a stream."""
        return {
            "order": dict(self._order),
            "rows": self._count,
            "streams": [stream.get_state() for stream in self._streams],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state was taken; `DataError` where that state belongs to another order."""
        for name in sorted(state["order"].keys() | self._order.keys()):
            then, now = state["order"].get(name), self._order.get(name)
            if then != now:
                raise DataError(
                    f"the checkpoint's data order has {name}={then}, this run {name}={now}: restore the old value, or "
                    "start a new run with --checkpoint.init_from"
                )
        self._count = state["rows"]
        for stream, stream_state in zip(self._streams, state["streams"], strict=True):
            stream.set_state(stream_state)
