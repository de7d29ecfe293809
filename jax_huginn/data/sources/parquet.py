"""Token rows from parquet files: column `input_ids`, rows of train.sequence_length + 1 tokens."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError

PIECE_ROWS = 64  # rows read at once


def parquet_pieces(
    file: CorpusFile, offset: int = 0, *, length: int, vocab_size: int, bad: BadData, path: Path | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row number, the good ones of 64 rows, (n, length) int32) of column `input_ids` from row `offset` on.

    `bad` receives: null rows, rows of another length, null tokens or tokens outside [0, vocab_size); files that are not
    parquet, lack the column or have no rows; the rest of a file after a damaged page. An error of the system (a lost
    disk, a missing permission) is not a property of the data and raises `DataError` under either policy.

    Args:
        path: the file's location on this machine, if it is not `file.path`.
    """
    try:
        for first, column in _columns(file, path or file.path, offset):
            rows = _token_rows(file, first, column, length, vocab_size, bad)
            bad.read(len(rows))
            yield first, rows
    except _UnusableError as error:
        return bad.file(file, str(error))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}; fix or remove it") from None
    bad.finished(file)
    return None


def row_byte(file: CorpusFile, row: int) -> float:
    """About where a row lies in the bytes of a file on this machine; 0 for a file that cannot be read."""
    if rows := _rows_of(file.path):
        return row / rows * file.bytes_to_read
    return 0.0


@lru_cache(maxsize=64)
def _rows_of(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except Exception:  # its reader says what is wrong with it
        return 0


class _UnusableError(Exception):
    """A file that is not a table of token rows."""


def _columns(file: CorpusFile, path: Path, offset: int) -> Iterator[tuple[int, Any]]:
    """Yield (row number, Arrow list column of at most 64 rows) of a stream's share from row `offset` on.

    Every `OSError` raised has an error number, so it came from the system.
    """
    import pyarrow.parquet as pq

    try:
        # Not memory-mapped: truncating the file while it is read would kill the process with SIGBUS.
        with pq.ParquetFile(path, memory_map=False) as table:
            if complaint := _complaint(table.schema_arrow):
                raise _UnusableError(complaint)
            if not table.metadata.num_rows:
                raise _UnusableError("has no rows")
            low, high = _share(file, table.metadata.num_rows)
            offset, first = max(offset, low), 0
            for group in range(table.num_row_groups):
                end = first + table.metadata.row_group(group).num_rows
                if offset < end and first < high:
                    # One group at a time, so that pieces begin at the same rows wherever reading starts, and a damaged
                    # group always costs the same rows.
                    for batch in table.iter_batches(PIECE_ROWS, row_groups=[group], columns=["input_ids"]):
                        batch = batch[: end - first]  # a damaged file may contain more rows than it declares
                        begin = max(offset - first, 0)
                        if begin < min(len(batch), high - first):
                            yield first + begin, batch.column(0)[begin : high - first]
                        first += len(batch)
                first = end
    except _UnusableError:
        raise
    except Exception as error:  # Arrow's own, OSError without a number, UnicodeDecodeError (column names)
        if isinstance(error, OSError) and error.errno:
            raise
        raise _UnusableError(f"cannot be read as parquet: {_first_line(error)}") from None


def _share(file: CorpusFile, rows: int) -> tuple[int, int]:
    """The first row of a stream's part, and the row after its last: those at its share of the bytes."""
    low, high = (each * rows // max(file.bytes_to_read, 1) for each in file.share or (0, file.bytes_to_read))
    return low, high if file.share else rows


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _complaint(schema: Any) -> str:
    """What is wrong with a file's columns, or an empty string."""
    import pyarrow as pa

    kinds = [field.type for field in schema if field.name == "input_ids"]
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if len(kinds) == 1 and any(check(kinds[0]) for check in lists) and pa.types.is_integer(kinds[0].value_type):
        return ""
    found = "no such column" if not kinds else f"type {kinds[0]}" if len(kinds) == 1 else f"{len(kinds)} of them"
    return f"must have a column input_ids of type list<int>; it has {found}"


def _token_rows(file: CorpusFile, first: int, column: Any, length: int, vocab_size: int, bad: BadData) -> np.ndarray:
    """The good rows, (n, length) int32, of an Arrow list column whose first row is the file's row `first`."""
    import pyarrow as pa

    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(lengths != length).tolist():
        reasons[row] = "is null" if lengths[row] < 0 else f"has {lengths[row]} tokens, not {length}"
    whole = np.flatnonzero(lengths == length)
    values = column.filter(pa.array(lengths == length)).flatten()
    missing = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, length)
    tokens = values.fill_null(0).to_numpy(zero_copy_only=False).reshape(-1, length)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    for index in np.flatnonzero((missing | wrong).any(axis=1)).tolist():
        if missing[index].any():
            reasons[int(whole[index])] = "has a null token"
        else:
            token = tokens[index, np.argmax(wrong[index])]
            reasons[int(whole[index])] = f"has token {token}, outside [0, {vocab_size}) of model.vocab_size"
    for row in sorted(reasons):
        bad.row(file, lambda row=row: f"row {first + row}", reasons[row])
    return tokens[~(missing | wrong).any(axis=1)].astype(np.int32)
