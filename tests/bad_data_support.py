"""Parquet files of token rows with bad rows among them, shared by the tests of data."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_huginn.config.schema import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile
from jax_huginn.data.sources.parquet import parquet_pieces

S, V = 4, 1000
BAD: dict[str, Any] = {
    "null": None,
    "short": [1, 2],
    "empty": [],
    "long": [1] * (S + 2),
    "null token": [1, None, 3, 4, 5],
    "too large": [1, 2, 3, 4, V],
    "negative": [-1, 2, 3, 4, 5],
}


def good(first: int, count: int) -> list[list[int]]:
    """Rows that tell their number in their first token."""
    return [[first + index, 1, 2, 3, 4] for index in range(count)]


def write(path: Path, rows: list, group: int = 10) -> CorpusFile:
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    pq.write_table(table, path, row_group_size=group, use_dictionary=False, compression="none")
    return CorpusFile(path.name, path)


def with_bad(rows: list[list[int]]) -> list:
    """Each kind of bad row among the good ones, at the file's beginning and end too."""
    mixed: list = []
    for index, bad in enumerate(BAD.values()):
        mixed += [bad, *rows[index * 3 : index * 3 + 3]]
    return [*mixed, *rows[len(BAD) * 3 :], [7]]


def read(file: CorpusFile, offset: int = 0, bad: BadData | None = None, **settings: Any) -> list[int]:
    skip = bad or BadData("skip", lambda line: None)
    fields = {"length": S + 1, "vocab_size": V} | settings
    return [int(row[0]) for _, piece in parquet_pieces(file, offset, bad=skip, **fields) for row in piece]


def make_config(folder: Path, policy: str = "skip", **data: Any) -> Config:
    fields = {"source": "parquet", "path": str(folder), "streams": 3, "shuffle_window": 7, "bad_rows": policy}
    return Config(
        model=ModelConfig(vocab_size=V),
        train=TrainConfig(batch_size=2, sequence_length=S),
        data=DataConfig(**fields | {"validation_fraction": 0.0} | data),  # pyright: ignore[reportArgumentType]
        validation=ValidationConfig(sequences=2),
    )
