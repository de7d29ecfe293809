"""Damaged parquet gives rows, a skip or an error of one line.

More than the suite's cases: HUGINN_FUZZ=5000 pytest tests/test_data_fuzz.py
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.parquet import parquet_pieces
from tests.bad_data_support import S, V, read

CASES = int(os.environ.get("HUGINN_FUZZ", "300"))


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, removed, repeated or inserted stretches; often in the footer, where the schema is."""
    raw = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        near_end = rng.random() < 0.5
        place = int(rng.integers(max(len(raw) - 600, 0) if near_end else 0, max(len(raw), 1)))
        stretch = int(rng.choice([1, 2, 4, 8, 40, 300]))
        noise = rng.integers(0, 256, stretch, np.uint8).tobytes()
        match rng.integers(0, 7):
            case 0 | 1:
                raw[place : place + 1] = bytes([raw[place] ^ (1 << int(rng.integers(8)))]) if raw else b""
            case 2:
                raw[place : place + stretch] = noise
            case 3:
                del raw[place : place + stretch]
            case 4:
                raw[place:place] = noise
            case 5:
                raw[place : place + stretch] = rng.choice([b"\0", b"\xff", b"\x7f"]) * stretch
            case 6:
                raw[place:place] = raw[place : place + stretch]
    return bytes(raw)


def originals(path: Path) -> list[bytes]:
    """Small files of every layout: with and without dictionary and compression, old and new pages, other types."""
    contents, rng = [], np.random.default_rng(0)
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), S + 1)):
        rows = rng.integers(0, V, (60, S + 1)).tolist()
        table = pa.table({"input_ids": pa.array(rows, kind), "other": ["text"] * 60})
        for options in (
            {"compression": "none", "use_dictionary": False},
            {"compression": "snappy", "use_dictionary": True},
            {"compression": "zstd", "data_page_version": "2.0", "write_page_checksum": True},
            {"compression": "gzip", "column_encoding": None, "use_dictionary": False, "data_page_size": 64},
        ):
            pq.write_table(table, path, row_group_size=25, **options)
            contents.append(path.read_bytes())
    return contents


def test_fuzzed_parquet_gives_rows_or_a_data_error(tmp_path: Path) -> None:
    contents = originals(tmp_path / "original.parquet")
    file = CorpusFile("fuzzed.parquet", tmp_path / "fuzzed.parquet")
    outcomes = {"rows": 0, "stopped": 0, "skipped": 0}
    for case in range(CASES):
        rng = np.random.default_rng([17, case])
        file.path.write_bytes(damage(contents[case % len(contents)], rng))
        lines: list[str] = []
        bad = BadData("skip", lines.append)
        for _, piece in parquet_pieces(file, int(rng.integers(0, 3)) * 20, length=S + 1, vocab_size=V, bad=bad):
            assert piece.dtype == np.int32
            assert piece.shape[1] == S + 1
            assert not piece.size or (piece.min() >= 0 and piece.max() < V)
        outcomes["skipped"] += bad.files
        try:
            read(file, bad=BadData("stop", print))
            outcomes["rows"] += 1
        except DataError as error:
            outcomes["stopped"] += 1
            lines.append(str(error))
        assert not any("\n" in line for line in lines)
    assert outcomes["rows"] > CASES / 50
    assert outcomes["stopped"] > CASES / 3
    assert outcomes["skipped"] > CASES / 3
