"""A row of a batch is traced to its file: the tokens found there are the row's."""

import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import parquet_files, text_files
from jax_huginn.data.sources.parquet import parquet_pieces
from jax_huginn.data.streams import RowDataset


@pytest.mark.parametrize(("window", "streams"), [(1, 1), (7, 3), (300, 2)])
def test_every_row_is_traced_through_windows_epochs_and_streams(tmp_path, window, streams):
    number = 0
    for index in range(5):
        rows = [[number + row, index, 0] for row in range(20 + index)]
        number += len(rows)
        pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / f"{index}.parquet")
    pieces = partial(parquet_pieces, length=3, vocab_size=1000, bad=BadData("stop", print))
    dataset = RowDataset(
        parquet_files(str(tmp_path)),
        pieces,
        take=1, stride=1, seed=5, streams=streams, shuffle_window=window, settings={},
    )  # fmt: skip
    iterator = iter(dataset)
    for _ in range(25):  # 200 rows: nearly two epochs
        position = iterator.get_state()
        for row, tokens in enumerate([next(iterator) for _ in range(8)]):
            said = dataset.locate(pieces, position, row)
            match = re.fullmatch(rf"{re.escape(str(tmp_path))}/(\d)\.parquet, row (\d+)", said)
            assert match, said
            table = pq.read_table(tmp_path / f"{match[1]}.parquet").column("input_ids").to_pylist()
            np.testing.assert_array_equal(table[int(match[2])], tokens)


def test_text_is_traced_to_a_byte_and_a_token(tmp_path):
    (tmp_path / "a.txt").write_text("x")

    def pieces(file, offset):
        yield from ((begin, np.arange(begin, begin + 10, dtype=np.int32)) for begin in range(offset, 50, 10))

    dataset = RowDataset(
        text_files(str(tmp_path)), pieces, take=5, stride=4, seed=0, streams=1, shuffle_window=4, settings={}
    )
    iterator = iter(dataset)
    for _ in range(30):
        position, row = iterator.get_state(), next(iterator)
        byte, token = map(int, re.findall(r"byte (\d+), token (\d+)", dataset.locate(pieces, position, 0))[0])
        assert byte + token == row[0]
