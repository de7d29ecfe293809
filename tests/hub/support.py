"""A small corpus on a loopback hub, and what is asked of the data built from it."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.config.schema import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.sources.files import DataError
from tests.hub_server import REPOSITORY

S, V = 8, 96


def rows(count: int, seed: int, bad: int = 0) -> bytes:
    """A parquet file of `count` rows, the first `bad` of which are too short."""
    tokens = np.random.default_rng(seed).integers(0, V, (count, S + 1)).tolist()
    tokens[:bad] = [[1]] * bad
    content = io.BytesIO()
    pq.write_table(pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32()))}), content)
    return content.getvalue()


TRAIN = {f"train/{index}.parquet": rows(40, index) for index in range(8)}
HELD_OUT = {f"val/{index}.parquet": rows(40, 100 + index) for index in range(2)}
FILES = TRAIN | HELD_OUT | {"README.md": b"text"}
NAME = "train/0.parquet"


def make_config(folder: Path, seed: int = 0, batch_size: int = 4, **data: Any) -> Config:
    fields = {
        "source": "hub",
        "path": REPOSITORY,
        "cache_dir": str(folder / "cache"),
        "streams": 2,
        "shuffle_window": 8,
    }
    return Config(
        model=ModelConfig(vocab_size=V),
        train=TrainConfig(batch_size=batch_size, sequence_length=S, seed=seed),
        data=DataConfig(**fields | data),
        validation=ValidationConfig(sequences=4),
    )


def build(folder: Path, run: str = "run", report: Callable[[str], None] = lambda line: None, **data: Any) -> Data:
    return build_data(make_config(folder, **data), folder / run / "tokenizer", report=report)


def take(data: Data, count: int) -> np.ndarray:
    """The tokens of the next batches, (count, B, S)."""
    return np.stack([next(data.train)["tokens"] for _ in range(count)])


def in_cache(folder: Path, suffix: str = ".parquet") -> dict[str, Path]:
    return {path.stem: path for path in (folder / "cache").rglob(f"*{suffix}")}


def bytes_in_cache(folder: Path) -> int:
    total = 0
    for suffix in (".parquet", ".part"):
        for path in in_cache(folder, suffix).values():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
