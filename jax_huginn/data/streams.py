"""The order of the data: `data.streams` virtual streams (V), a pure function of files, settings and seed.

Row j of the training sequence comes from stream j mod V, whatever the number of threads, processes or devices. In each
epoch the streams share the corpus evenly, in another way every time (`spans`), and each reads its spans endlessly.
Documents become `BOS text EOS` tokens, then rows of S + 1 tokens with stride S: a row's last token is the next row's
first, so every token except a stream's first is a label once an epoch. A document that is cut between two streams gets
no token at the cut. Parquet rows are used as they are. Rows are shuffled within windows of `data.shuffle_window` rows.
Tokens left over at the end of a span begin a row that continues into the next one; a window ends with the epoch in
which its rows begin.

A stream's state is the number of its window, the place where the window starts and the rows taken from it; restoring
reads that window again.

Process p of P owns the streams i with i mod P = p and returns the rows j with j mod P = p, so P must divide V.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from jax_huginn.data.permutation import WINDOW, permutation
from jax_huginn.data.reader import Pieces, Place, RowReader, Watcher
from jax_huginn.data.resume import local_part, require_same_order
from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.spans import Spans

ORDER_VERSION = 2  # raise it whenever the same files, settings and seed give other rows


class Stream:
    """A reader's rows, shuffled within windows.

    For each row returned from one window, a row of the next is read, so training never waits at a window's end.
    """

    def __init__(self, reader: RowReader, window_rows: int, seed: int, stream: int) -> None:
        self.reader, self._window_rows, self._seed, self._stream = reader, window_rows, seed, stream
        self.set_state([0, 0, 0, 0, 0, 0])

    def get_state(self) -> list[int]:
        """[window, epoch, file, piece, item, rows taken from the window]."""
        return [self._window, *self._start, self._taken]

    def set_state(self, state: list[int], skipped: Sequence[int] = (0, 0, 0, 0)) -> None:
        """Resume where `state` and `skipped` were read."""
        self._window, *start, self._taken = state
        self._start = self._next_start = Place(*start)
        self._start_skipped, self._end_skipped = (skipped[0], skipped[1]), (skipped[2], skipped[3])
        self._rows: list[np.ndarray] | None = None  # the current window, once it is read
        self._next: list[np.ndarray] = []  # rows of the next window read so far
        self.reader.seek(self._start, self._start_skipped)

    @property
    def skipped(self) -> list[int]:
        """Rows and files skipped before the current window, then both before its end.

        Stored with the state, because a restored stream has read ahead, and skipped, less than the original.
        """
        return [*self._start_skipped, *self._end_skipped]

    def next_row(self) -> np.ndarray:
        """The next row, (S + 1,) int32."""
        if self._rows is None:
            self._read_ahead(self._window_rows)
            order = self._order(self._window, len(self._next))
            self._rows, self._next = [self._next[index] for index in order], []
            self._next_start, self._end_skipped = self.reader.place, self.reader.skipped
        row = self._rows[self._taken]
        self._taken += 1
        left = len(self._rows) - self._taken
        self._read_ahead(-(-(self._window_rows - len(self._next)) // (left + 1)))
        if not left:
            self._window, self._start, self._taken, self._rows = self._window + 1, self._next_start, 0, None
            self._start_skipped = self._end_skipped
        return row

    def place(self, ahead: int) -> Place:
        """Where the row `ahead` rows after the next one begins. Moves the stream: for a copy made for this purpose."""
        wanted, window = self._taken + ahead, self._window
        while True:
            begins: list[Place] = []
            while len(begins) < self._window_rows and not (begins and self.reader.place.epoch != begins[0].epoch):
                begins.append(self.reader.place)
                self.reader.next_row()
            if wanted < len(begins):
                return begins[self._order(window, len(begins))[wanted]]
            wanted, window = wanted - len(begins), window + 1

    def _order(self, window: int, count: int) -> list[int]:
        return permutation(count, self._seed, WINDOW, self._stream, window)

    def _read_ahead(self, count: int) -> None:
        """Read up to `count` rows of the next window, which ends with its epoch."""
        for _ in range(min(count, self._window_rows - len(self._next))):
            if self._next and self.reader.place.epoch != self._next_start.epoch:
                return
            self._next.append(self.reader.next_row())


class RowDataset(grain.IterDataset):
    """The endless training sequence of rows, (S + 1,) int32, or one process's share."""

    def __init__(
        self,
        files: Sequence[CorpusFile],
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
        bytes_before: Callable[[CorpusFile, int], float] | None = None,
    ) -> None:
        """
        Args:
            bytes_before: bytes of a file before a piece, for `epochs`.
            settings: everything else that fixes the order, the contents of the files too; a state with other settings
                is refused.

        Raises:
            DataError: `processes` does not divide the number of streams.
        """
        super().__init__()
        if streams % processes:
            raise DataError(
                f"{processes} processes cannot share data.streams={streams}: set it to a multiple of their number"
            )
        self._spans = Spans(files, seed, streams)
        self._pieces, self._take, self._stride = pieces, take, stride
        self._seed, self._window = seed, shuffle_window
        self._process, self._processes, self._bad, self._watcher = process, processes, bad, watcher
        self._streams, self._bytes_before = streams, bytes_before or (lambda file, piece: 0.0)
        self._order = {
            "version": ORDER_VERSION,
            "seed": seed,
            "streams": self._streams,
            "shuffle_window": shuffle_window,
            **settings,
        }

    @property
    def owned(self) -> range:
        """The streams that this process reads."""
        return range(self._process, self._streams, self._processes)

    def epochs(self, position: dict[str, Any]) -> float:
        """Epochs read at this process's part of a position, a mean over its streams; exact to a shuffle window."""
        read = 0.0
        for index, (_, epoch, number, piece, *_) in zip(self.owned, position["streams"], strict=True):
            parts = self._spans.parts(index, epoch)
            within = self._bytes_before(parts[number], piece) if number < len(parts) else 0.0
            read += epoch + self._spans.share_before(index, epoch, number, within)
        return round(read / len(self.owned), 5)

    def _stream(self, index: int, pieces: Pieces, bad: BadData | None, watcher: Watcher | None) -> Stream:
        reader = RowReader(self._spans, pieces, self._take, self._stride, index, bad, watcher)
        return Stream(reader, self._window, self._seed, index)

    def __iter__(self) -> "RowIterator":
        streams = [self._stream(index, self._pieces, self._bad, self._watcher) for index in self.owned]
        return RowIterator(streams, self._order, self._process, self._processes)

    def locate(self, pieces: Pieces, position: dict[str, Any], row: int) -> str:
        """Where row `row` of the next batch begins: 'FILE, row 17' or, in text, 'FILE, byte 4096, token 17'.

        Reads up to two windows of one stream again, so it is meant for the rare report.

        Args:
            pieces: reads files as the dataset's own does, but counts what it skips elsewhere.
            position: the training iterator's state before the batch.
        """
        process, processes = position.get("process", (0, 1))
        index = (position["rows"] + row) % self._streams
        if index % processes != process:
            return f"a file of process {index % processes}"
        stream = self._stream(index, pieces, None, None)
        stream.set_state(position["streams"][index // processes])
        epoch, number, piece, item = stream.place(ahead=row // self._streams)
        file = self._spans.parts(index, epoch)[number]
        return f"{file.path}, row {piece + item}" if self._take == 1 else f"{file.path}, byte {piece}, token {item}"


class RowIterator(grain.DatasetIterator):
    """Deals the streams' rows in turn."""

    def __init__(self, streams: list[Stream], order: dict[str, Any], process: int, processes: int) -> None:
        super().__init__()
        self._streams, self._order, self._process, self._processes = streams, order, process, processes
        self._count, self._announced = 0, False

    def __next__(self) -> np.ndarray:
        if not self._announced:  # the first files of all streams at once, so that they are fetched in parallel
            self._announced = True
            for stream in self._streams:
                stream.reader.announce()
        row = self._streams[self._count % len(self._streams)].next_row()
        self._count += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """This process's part of the position; `resume.whole_position` merges the parts.

        `rows` counts those of all processes; `streams` and `skipped` have an entry for each of this process's streams.
        `reading`, each stream's current file over all epochs, serves the hub's cache and is no part of the position.
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
        """Resume exactly where the state, this process's part or a whole position, was read.

        Raises:
            DataError: the state belongs to another order.
        """
        if state["order"].get("version") != ORDER_VERSION:
            raise DataError(
                "the checkpoint's data order was made by another version of this program: resume with that version, "
                "or start a new run with --checkpoint.init_from"
            )
        require_same_order(state["order"], self._order)
        part = local_part(state, self._process, self._processes)
        self._count, self._announced = part["rows"] // self._processes, False
        for stream, position, skipped in zip(self._streams, part["streams"], part["skipped"], strict=True):
            stream.set_state(position, skipped)
