"""Processes share the rows that one would read, and a run resumes with another number of them."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_huginn.data.pipeline import build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.streams import RowDataset
from tests.bad_data_support import make_config


def numbered(count: int, processes: int, process: int, streams: int = 4) -> Iterator[np.ndarray]:
    """A share of the rows of `count` files, some of which are of no use."""

    def pieces(bad: BadData, file: CorpusFile, offset: int) -> Iterator[tuple[int, np.ndarray]]:
        number = int(file.relative_path)
        if number % 5 == 4:
            return bad.file(file, "is of no use")
        first, last = file.share or (0, 11 + number)
        for begin in range(max(offset, first), last, 3):
            items = np.arange(begin, min(begin + 3, last))
            for row in items[items % 4 == 3]:
                bad.row(file, lambda row=row: f"row {row}", "is bad")
            yield begin, (1000 * number + items[items % 4 != 3])[:, None]
        return None

    bad = BadData("skip", lambda line: None)
    files = [CorpusFile(str(index), Path(str(index)), size=11 + index) for index in range(count)]
    return iter(
        RowDataset(
            files,
            partial(pieces, bad),
            take=1,
            stride=1,
            seed=3,
            streams=streams,
            shuffle_window=5,
            settings={},
            process=process,
            processes=processes,
            bad=bad,
        )
    )


def interleaved(iterators: list[Any], count: int) -> np.ndarray:
    """The next `count` rows of all processes together, in the order of their numbers."""
    return np.concatenate([next(iterators[row % len(iterators)]) for row in range(count)])


def test_processes_share_the_rows_of_one(tmp_path: Path) -> None:
    alone = interleaved([numbered(23, 1, 0)], 800)
    for processes in (2, 4):
        share = [numbered(23, processes, process) for process in range(processes)]
        np.testing.assert_array_equal(interleaved(share, 800), alone)


@pytest.mark.parametrize("path", [(1, 2), (2, 4), (4, 1), (1, 4, 2, 1), (4, 2)])
@pytest.mark.parametrize("batches", [1, 7, 40])
def test_resuming_with_another_number_of_processes_is_exact(path: tuple[int, ...], batches: int) -> None:
    alone = numbered(23, 1, 0)
    expected = interleaved([alone], 8 * batches * (len(path) + 1))
    position, rows = None, []
    for processes in path:
        share: list[Any] = [numbered(23, processes, process) for process in range(processes)]
        for each in share if position else []:
            each.set_state(json.loads(json.dumps(position)))
        rows.append(interleaved(share, 8 * batches))
        position = whole_position([each.get_state() for each in reversed(share)])
        assert position["rows"] == sum(map(len, rows))
        assert set(position) == {"order", "rows", "streams", "skipped"}
    got = np.concatenate(rows)
    np.testing.assert_array_equal(got, expected[: len(got)])
    last: Any = numbered(23, 1, 0)
    last.set_state(position)
    np.testing.assert_array_equal(interleaved([last], 8 * batches), expected[len(got) : len(got) + 8 * batches])
    replay: Any = numbered(23, 1, 0)
    interleaved([replay], len(got))
    assert whole_position([replay.get_state()]) == position


def test_a_number_of_processes_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 processes cannot share data\.streams=4: set it to a multiple") as error:
        numbered(23, 3, 0, 4)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"batch_size=2 .* 4 processes cannot share"):
        build_data(make_config(tmp_path), tmp_path / "run", process=1, processes=4)
    alone: Any = numbered(23, 1, 0)
    next(alone)
    share: Any = numbered(23, 2, 0)
    with pytest.raises(DataError, match="divisible by the number of processes"):
        share.set_state(whole_position([alone.get_state()]))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    share: list[Any] = [numbered(23, 2, process) for process in range(2)]
    interleaved(share, 8)
    parts = [each.get_state() for each in share]
    for wrong in ([parts[0]], [parts[0], parts[0]], [*parts, parts[0]]):
        with pytest.raises(DataError, match="parts of a position come from processes"):
            whole_position(wrong)
    next(share[0])
    with pytest.raises(DataError, match="differ in rows"):
        whole_position([each.get_state() for each in share])
    with pytest.raises(DataError, match="was given to"):
        share[1].set_state(parts[0])
