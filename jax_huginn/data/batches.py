"""The training batches as the loop sees them: an iterator that knows its position and what it has read."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import grain

    from jax_huginn.data.sources.hub import HubFiles

LOCATABLE = 3  # last batches whose rows can be traced to their files; records are seen a step late


class TrainBatches:
    """The endless training batches, prepared ahead by a thread: one process's share of their rows.

    A batch is a dict of `tokens` and `labels`, both (B / processes, S) int32; labels are the next tokens, or `IGNORE`.
    """

    def __init__(
        self,
        batches: "grain.DatasetIterator[dict[str, np.ndarray]]",
        hub: "HubFiles | None" = None,
        locate: Callable[[dict[str, Any], int], str] | None = None,
        keep: Callable[[], None] = lambda: None,
        check: Callable[[dict[str, Any]], None] = lambda order: None,
        epochs: Callable[[dict[str, Any]], float] | None = None,
    ) -> None:
        """
        Args:
            locate: (position before a batch, row in it) -> its file and place, see `RowDataset.locate`.
            keep: called before the first batch: writes into the run folder what the data are.
            check: called with the order of a position before resuming there, see `Contents.check`.
            epochs: epochs read at a position, see `RowDataset.epochs`.
        """
        self._batches, self._hub, self._locate = batches, hub, locate
        self._keep, self._check, self._kept, self._epochs = keep, check, False, epochs
        self.seen: dict[str, float] = {}
        """Epochs read so far, for the records; empty for rows without epochs."""
        self._begins: deque[dict[str, Any]] = deque(maxlen=LOCATABLE)
        self.skipped: dict[str, int] = {}
        """Nonzero counts of rows and files skipped so far, up to the shuffle windows the last batch came from."""

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._kept:
            self._kept = True
            self._keep()
        self._begins.append(self.position)
        batch = next(self._batches)
        state = self.position
        rows, files = (sum(each[index] for each in state["skipped"]) for index in (2, 3))
        self.skipped = {"data_rows_skipped": rows} if rows else {}
        self.skipped |= {"data_files_skipped": files} if files else {}
        if self._epochs:
            self.seen = {"epochs": self._epochs(state)}
        if self._hub:
            self._hub.handed_out(state)
        return batch

    @property
    def position(self) -> dict[str, Any]:
        """Where the last batch ends: this process's part, see `resume`."""
        return self._batches.get_state()  # pyright: ignore[reportReturnType]

    def locate(self, row: int) -> str:
        """The file and place of row `row` of the training sequence, if it is in one of the last batches."""
        assert self._locate is not None
        begin = max((each for each in self._begins if each["rows"] <= row), key=lambda each: each["rows"])
        return self._locate(begin, row - begin["rows"])

    def get_state(self) -> dict[str, Any]:
        """`position`, for a checkpoint: from now on the hub's cache keeps the files that resuming there reads."""
        state = self.position
        if self._hub:
            self._hub.saved(state)
        return state

    def set_state(self, position: dict[str, Any]) -> None:
        """Resume exactly after the batch where `position`, whole or this process's part, was read."""
        self._check(position["order"])
        self._batches.set_state(position)

    def close(self) -> None:
        """Stop the threads."""
        if self._hub:
            self._hub.close()  # first: the thread that prepares batches may be waiting for a file
        self._batches.close()
