"""Token rows from parquet files: column `input_ids`, rows of train.sequence_length + 1 tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_huginn.data.sources.bad import BadData
from jax_huginn.data.sources.files import DataError, TextFile

PIECE_ROWS = 64  # rows that are read at once


def parquet_pieces(
    file: TextFile, offset: int = 0, *, length: int, vocab_size: int, bad: BadData, path: Path | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row number, good rows of the next 64, (n, length) int32) of column `input_ids` from row `offset` on.

    Bad, and left to the policy `bad`, are: a null row, one that is not `length` tokens long, a null token or one
    outside [0, vocab_size); a file that is no parquet, has no such column or no rows; what follows a damaged page.
    An error of the system while reading (a lost disk, a missing permission) is no property of the data: `DataError`.

    Args:
        path: where the file lies, if not at `file.path`.
    """
    try:
        for first, column in _columns(path or file.path, offset):
            yield first, _token_rows(file, first, column, length, vocab_size, bad)
    except _UnusableError as error:
        return bad.file(file, str(error))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}; mend it or take it out") from None
    bad.read(file)
    return None


class _UnusableError(Exception):
    """A file whose content is no table of token rows."""


def _columns(path: Path, offset: int) -> Iterator[tuple[int, Any]]:
    """Yields (row number, Arrow list column of at most 64 rows) from row `offset` on.

    Raises `OSError` only with an error number, which the system gave.
    """
    import pyarrow.parquet as pq

    try:
        # Memory-mapped, a file cut short under the reader's hands would end the process by SIGBUS.
        with pq.ParquetFile(path, memory_map=False) as table:
            if complaint := _complaint(table.schema_arrow):
                raise _UnusableError(complaint)
            if not table.metadata.num_rows:
                raise _UnusableError("has no rows")
            first = 0
            for group in range(table.num_row_groups):
                end = first + table.metadata.row_group(group).num_rows
                if end > offset:
                    # A group at a time: pieces begin at the same rows wherever reading starts, and a damaged group
                    # takes the same rows with it.
                    for batch in table.iter_batches(PIECE_ROWS, row_groups=[group], columns=["input_ids"]):
                        batch = batch[: end - first]  # a damaged file may hold more than it says
                        begin = max(offset - first, 0)
                        if begin < len(batch):
                            yield first + begin, batch.column(0)[begin:]
                        first += len(batch)
                first = end
    except _UnusableError:
        raise
    except Exception as error:  # Arrow's own, OSError without a number, and UnicodeDecodeError for a column's name
        if isinstance(error, OSError) and error.errno:
            raise
        raise _UnusableError(f"cannot be read as parquet: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _complaint(schema: Any) -> str:
    """What is wrong with a file's columns; empty if nothing is."""
    import pyarrow as pa

    kinds = [field.type for field in schema if field.name == "input_ids"]
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if len(kinds) == 1 and any(check(kinds[0]) for check in lists) and pa.types.is_integer(kinds[0].value_type):
        return ""
    found = "no such column" if not kinds else f"type {kinds[0]}" if len(kinds) == 1 else f"{len(kinds)} of them"
    return f"must have a column input_ids of type list<int>; it has {found}"


def _token_rows(file: TextFile, first: int, column: Any, length: int, vocab_size: int, bad: BadData) -> np.ndarray:
    """The good rows, (n, length) int32, of an Arrow list column, whose row 0 is the file's row `first`."""
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
