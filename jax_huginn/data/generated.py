"""Rows that are made from (seed, row number): endless, and nothing on disk."""

from typing import Any

import grain

from jax_huginn.data.permutation import EXAMPLE, HELD_OUT, random_bits
from jax_huginn.data.resume import local_part, require_same_order
from jax_huginn.data.rows import Row
from jax_huginn.data.tasks import TASKS

EASIEST = 2  # hardest difficulty of the first row under a curriculum


class GeneratedRows(grain.IterDataset):
    """The endless training sequence of a task, or one process's share: rows p, p + P, ... for process p of P."""

    def __init__(
        self,
        task: str,
        *,
        length: int,
        difficulty: int,
        curriculum_rows: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """
        Args:
            task: name of one of `TASKS`.
            difficulty: the hardest of an example.
            curriculum_rows: rows over which the hardest example grows to it; 0: hardest from the start.
        """
        super().__init__()
        self._length, self._share = length, (process, processes)
        self._order = {
            "seed": seed,
            "task": task,
            "sequence_length": length,
            "difficulty": difficulty,
            "curriculum_rows": curriculum_rows,
        }

    def __iter__(self) -> "GeneratedIterator":
        return GeneratedIterator(self, self._order, *self._share)

    def row(self, number: int) -> Row:
        """Row `number` of the training sequence."""
        order = self._order
        hardest, ramp = order["difficulty"], order["curriculum_rows"]
        if number < ramp:
            hardest = min(hardest, EASIEST) + max(hardest - EASIEST, 0) * number // ramp
        bits = random_bits(self._length + 1, order["seed"], EXAMPLE, number)
        return TASKS[order["task"]].row(iter(bits.tolist()), self._length, hardest)

    def locate(self, position: dict[str, Any], row: int) -> str:
        """Name of row `row` of the batch that begins at `position`."""
        return f"row {position['rows'] + row} of data.task={self._order['task']}"


class GeneratedIterator(grain.DatasetIterator):
    """Counts rows; its state has the fields of `resume` and no streams."""

    def __init__(self, rows: GeneratedRows, order: dict[str, Any], process: int, processes: int) -> None:
        super().__init__()
        self._rows, self._order, self._process, self._processes, self._count = rows, order, process, processes, 0

    def __next__(self) -> Row:
        row = self._rows.row(self._count * self._processes + self._process)
        self._count += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """This process's part of the position; `rows` counts those of all processes."""
        return {
            "process": [self._process, self._processes],
            "order": dict(self._order),
            "rows": self._count * self._processes,
            "streams": [],
            "skipped": [],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume exactly where the state, this process's part or a whole position, was read.

        Raises:
            DataError: the state belongs to another order.
        """
        require_same_order(state["order"], self._order)
        self._count = local_part(state, self._process, self._processes)["rows"] // self._processes


def held_out_rows(task: str, *, count: int, length: int, hardest: int, seed: int) -> list[Row]:
    """Rows for validation, of difficulties up to `hardest`. Short examples may occur in training too."""
    bits = (random_bits(length + 1, seed, HELD_OUT, number).tolist() for number in range(count))
    return [TASKS[task].row(iter(each), length, hardest) for each in bits]
