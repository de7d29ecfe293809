"""The order of the data: `data.streams` virtual streams (V), a pure function of files, settings and seed.

Row j of the training sequence comes from stream j mod V, whatever the number of threads, processes or devices. Stream i
owns the files i, i + V, ... of the seeded order of files and reads them endlessly, each epoch in a new seeded order:
documents -> `BOS text EOS` tokens -> rows of S + 1 tokens with stride S (a row's last token is the next one's first, so
that every token but a stream's first is a label once an epoch) -> shuffled within windows of `data.shuffle_window`
rows. Parquet rows are taken as they are. What is left of an epoch's tokens begins the row that runs into the next
epoch; windows end with the epoch in which their rows begin. Fewer files than V make as many streams as files.

A position is (epoch, file within the epoch's order, piece within the file, token or row within the piece). A stream's
state is a window's number, the position where it starts and the rows taken from it; restoring reads that window again.

Process p of P owns the streams i with i mod P = p and hands out the rows j with j mod P = p, so V is divisible by P.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NoReturn, Protocol

import grain
import numpy as np

from jax_huginn.data.order import EPOCH, FILES, WINDOW, permutation
from jax_huginn.data.position import local_part
from jax_huginn.data.sources.bad import BadData
from jax_huginn.data.sources.files import DataError, TextFile

Position = tuple[int, int, int, int]
Pieces = Callable[[TextFile, int], Iterator[tuple[int, np.ndarray]]]
Piece = tuple[tuple[int, int, int], np.ndarray, tuple[int, int]]  # place, items, what was skipped before it
FRUITLESS_FILES = 3  # files without one good row, from the start on, after which a run is told so


class Watcher(Protocol):
    """Who is told which files are read next; the hub's cache fetches them."""

    def opens(self, stream: int, visit: int, files: Sequence[TextFile]) -> None:
        """Stream `stream` reads files[0] now, as its `visit`-th file of all epochs, and files[1] after it."""


class RowReader:
    """Rows of `take` items, `stride` apart, from the pieces of some files in a seeded order, epoch after epoch.

    Packed text: items are tokens, take S + 1, stride S. Parquet: an item is a row, take 1, stride 1.
    """

    def __init__(
        self,
        files: Sequence[TextFile],
        pieces: Pieces,
        take: int,
        stride: int,
        seed: int,
        stream: int,
        bad: BadData | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """`bad`: where `pieces` counts what it skips."""
        self._files, self._pieces, self._take, self._stride = files, pieces, take, stride
        self._seed, self._stream, self._watcher = seed, stream, watcher
        self._bad = bad or BadData("stop", print)
        self._source: Generator[Piece] | None = None
        self.seek((0, 0, 0, 0))

    def seek(self, position: Position, skipped: tuple[int, int] = (0, 0)) -> None:
        """Makes `position` the next row's first item; costs the reading of one piece."""
        epoch, file, piece, self._used = position
        if self._source:
            self._source.close()
        self._source = self._read(epoch, file, piece, skipped)
        self._buffer: deque[Piece] = deque()
        self._held = -self._used  # items in the buffer that are not used up
        self.visit = epoch * len(self._files) + file  # number of the file that is read, counted over all epochs

    def announce(self) -> None:
        """Tells the watcher which file is read next, before it is."""
        self._tell(*divmod(self.visit, len(self._files)))

    @property
    def skipped(self) -> tuple[int, int]:
        """Rows and files skipped up to the piece in which the next row begins."""
        self._hold(1)
        return self._buffer[0][2]

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
            while self._held < self._take and (piece := self._next_piece())[0][0] == 0:
                self._append(piece)
            if self._held <= self._take - self._stride:
                return
            yield self._cut(min(self._take, self._held))

    def _read(self, epoch: int, place: int, offset: int, skipped: tuple[int, int]) -> Generator[Piece]:
        found = place > 0 or offset > 0  # an epoch that is read from its beginning must hold something
        fruitless = -1 if found or epoch else 0  # files without a row before the very first one; -1: there was one
        rows, files = self._bad.rows - skipped[0], self._bad.files - skipped[1]
        while True:
            order = permutation(len(self._files), self._seed, EPOCH, self._stream, epoch)
            for index in range(place, len(order)):
                self.visit = epoch * len(order) + index
                self._tell(epoch, index)
                before = (self._bad.rows - rows, self._bad.files - files)
                for begin, items in self._pieces(self._files[order[index]], offset):
                    if len(items):
                        found, fruitless = True, -1
                        skips = (self._bad.rows, self._bad.files)
                        yield (epoch, index, begin), items, before
                        # Other streams skip too while this one waits.
                        rows, files = rows + self._bad.rows - skips[0], files + self._bad.files - skips[1]
                    before = (self._bad.rows - rows, self._bad.files - files)
                offset = 0
                if fruitless >= 0 and (fruitless := fruitless + 1) == FRUITLESS_FILES < len(order):
                    self._stop([self._files[place] for place in order[:FRUITLESS_FILES]])
            if not found:
                self._stop(self._files)
            found, place, epoch = False, 0, epoch + 1

    def _stop(self, files: Sequence[TextFile]) -> NoReturn:
        names = ", ".join(str(file.path) for file in files[:3])
        cause = f" ({self._bad.last})" if self._bad.last else ""
        raise DataError(f"no data in {len(files)} file(s), {names}{cause}; mend or remove them, or lower data.streams")

    def _tell(self, epoch: int, index: int) -> None:
        if self._watcher:
            order = permutation(len(self._files), self._seed, EPOCH, self._stream, epoch)
            coming = order[index : index + 2]
            if len(coming) < 2:
                coming += permutation(len(self._files), self._seed, EPOCH, self._stream, epoch + 1)[:1]
            self._watcher.opens(self._stream, epoch * len(order) + index, [self._files[place] for place in coming])

    def _next_piece(self) -> Piece:
        assert self._source is not None
        return next(self._source)

    def _append(self, piece: Piece) -> None:
        self._buffer.append(piece)
        self._held += len(piece[1])

    def _hold(self, count: int) -> None:
        while self._held < count:
            self._append(self._next_piece())
        self._drop_used()

    def _drop_used(self) -> None:
        while self._buffer and self._used >= len(self._buffer[0][1]):
            self._used -= len(self._buffer.popleft()[1])

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


class Stream:
    """A reader's rows, shuffled within windows.

    While one window is handed out the next is read, a row for a row: no window's end makes training wait.
    """

    def __init__(self, reader: RowReader, window_rows: int, seed: int, stream: int) -> None:
        self.reader, self._window_rows, self._seed, self._stream = reader, window_rows, seed, stream
        self.set_state([0, 0, 0, 0, 0, 0])

    def get_state(self) -> list[int]:
        """[window, epoch, file, piece, item, rows taken from the window]."""
        return [self._window, *self._start, self._taken]

    def set_state(self, state: list[int], skipped: Sequence[int] = (0, 0, 0, 0)) -> None:
        """Goes on where `state` and `skipped` were taken."""
        self._window, epoch, file, piece, item, self._taken = state
        self._start = self._coming_start = (epoch, file, piece, item)
        self._start_skipped, self._end_skipped = (skipped[0], skipped[1]), (skipped[2], skipped[3])
        self._rows: list[np.ndarray] | None = None  # the window that is handed out, once it is read
        self._coming: list[np.ndarray] = []  # what is read of the following one
        self.reader.seek(self._start, self._start_skipped)

    @property
    def skipped(self) -> list[int]:
        """Rows and files skipped before the window that is handed out, and the same up to its end.

        A part of the position: how much was read ahead, and skipped there, differs after a restore.
        """
        return [*self._start_skipped, *self._end_skipped]

    def next_row(self) -> np.ndarray:
        """The next row, (S + 1,) int32."""
        if self._rows is None:
            self._read_ahead(self._window_rows)
            order = permutation(len(self._coming), self._seed, WINDOW, self._stream, self._window)
            self._rows, self._coming = [self._coming[index] for index in order], []
            self._coming_start, self._end_skipped = self.reader.position, self.reader.skipped
        row = self._rows[self._taken]
        self._taken += 1
        left = len(self._rows) - self._taken
        self._read_ahead(-(-(self._window_rows - len(self._coming)) // (left + 1)))
        if not left:
            self._window, self._start, self._taken, self._rows = self._window + 1, self._coming_start, 0, None
            self._start_skipped = self._end_skipped
        return row

    def _read_ahead(self, count: int) -> None:
        """Reads up to `count` rows of the coming window; it ends with its epoch."""
        for _ in range(min(count, self._window_rows - len(self._coming))):
            if self._coming and self.reader.position[0] != self._coming_start[0]:
                return
            self._coming.append(self.reader.next_row())


class RowDataset(grain.IterDataset):
    """The endless training sequence of rows, (S + 1,) int32, or one process's share of it."""

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
        process: int = 0,
        processes: int = 1,
        bad: BadData | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """`settings`: whatever else fixes the order; a state is refused where they differ.

        Raises `DataError` where `processes` does not divide the number of streams.
        """
        super().__init__()
        self._files, self._pieces, self._take, self._stride = list(files), pieces, take, stride
        self._seed, self._window = seed, shuffle_window
        self._process, self._processes, self._bad, self._watcher = process, processes, bad, watcher
        self._streams = min(streams, len(self._files))
        if self._streams % processes:
            few = f", one for each of the {len(self._files)} file(s)" if self._streams < streams else ""
            raise DataError(
                f"{processes} processes cannot share {self._streams} streams{few} (data.streams={streams}): give more "
                "files, or a multiple of the processes as data.streams"
            )
        digest = hashlib.sha256()
        for file in self._files:
            size = file.path.stat().st_size if file.size is None else f"{file.size}\0{file.digest}"
            digest.update(f"{file.relative_path}\0{file.begin}\0{file.end}\0{size}\n".encode())
        self._order = {
            "seed": seed,
            "streams": self._streams,
            "shuffle_window": shuffle_window,
            "files": f"{len(self._files)} files, {digest.hexdigest()[:16]}",
            **settings,
        }

    def stream_files(self) -> dict[int, list[TextFile]]:
        """The files of each of this process's streams."""
        order = permutation(len(self._files), self._seed, FILES)
        owned = range(self._process, self._streams, self._processes)
        return {index: [self._files[place] for place in order[index :: self._streams]] for index in owned}

    def __iter__(self) -> "RowIterator":
        streams = []
        for index, files in self.stream_files().items():
            reader = RowReader(
                files, self._pieces, self._take, self._stride, self._seed, index, self._bad, self._watcher
            )
            streams.append(Stream(reader, self._window, self._seed, index))
        return RowIterator(streams, self._order, self._process, self._processes)


class RowIterator(grain.DatasetIterator):
    """Deals the streams' rows in turn."""

    def __init__(self, streams: list[Stream], order: dict[str, Any], process: int, processes: int) -> None:
        super().__init__()
        self._streams, self._order, self._process, self._processes = streams, order, process, processes
        self._count, self._announced = 0, False

    def __next__(self) -> np.ndarray:
        if not self._announced:  # all streams' first files at once, so that they are fetched side by side
            self._announced = True
            for stream in self._streams:
                stream.reader.announce()
        row = self._streams[self._count % len(self._streams)].next_row()
        self._count += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """This process's part of the position, of which `position.whole_position` makes the whole.

        `rows`: handed out by all processes. `streams`, `skipped`: of each own stream. `reading` is not part of the
        position: each stream's file, counted over all epochs.
        """
        return {
            "process": [self._process, self._processes],
            "order": dict(self._order),
            "rows": self._count * self._processes,
            "streams": [stream.get_state() for stream in self._streams],
            "skipped": [stream.skipped for stream in self._streams],
            "reading": [stream.reader.visit for stream in self._streams],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state, a part of this process or a whole, was taken.

        `DataError` where that state belongs to another order.
        """
        for name in sorted(state["order"].keys() | self._order.keys()):
            then, now = state["order"].get(name), self._order.get(name)
            if then != now:
                raise DataError(
                    f"the checkpoint's data order has {name}={then}, this run {name}={now}: restore the old value, or "
                    "start a new run with --checkpoint.init_from"
                )
        part = local_part(state, self._process, self._processes)
        self._count, self._announced = part["rows"] // self._processes, False
        for stream, position, skipped in zip(self._streams, part["streams"], part["skipped"], strict=True):
            stream.set_state(position, skipped)
