"""Bad rows and files are skipped, counted and reported, or stop the run; either way no position moves."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.bad_data import SHOWN, BadData
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.parquet import parquet_pieces
from jax_huginn.data.sources.text import text_pieces
from tests.bad_data_support import BAD, S, V, good, make_config, read, with_bad, write


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_skipped_or_stops(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "a.parquet", [*good(0, 70), BAD[kind], *good(70, 30)])
    lines: list[str] = []
    bad = BadData("skip", lines.append)
    assert read(file, bad=bad) == list(range(100))
    assert (bad.rows, bad.files, len(lines)) == (1, 0, 1)
    assert lines[0].startswith(f"skipped: {file.path} row 70 ")
    with pytest.raises(DataError, match=r"a\.parquet row 70 .*--data\.bad_rows skip") as error:
        read(file, bad=BadData("stop", print))
    assert "\n" not in str(error.value)


def bad_files(folder: Path) -> dict[str, CorpusFile]:
    """One file of every kind that cannot be used."""
    whole = write(folder / "whole.parquet", good(0, 50)).path.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "without an end": whole[:-3],
        "of zeros": bytes(1000),
        "of no bytes": b"",
        "text": b"PAR1 nothing",
    }
    tables = {
        "without the column": pa.table({"tokens": [[1]]}),
        "of text": pa.table({"input_ids": ["text"]}),
        "of numbers": pa.table({"input_ids": [1, 2]}),
        "of fractions": pa.table({"input_ids": [[1.5]]}),
        "without rows": pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))}),
        "without columns": pa.table({}),
    }
    files = {}
    for name, content in contents.items():
        (folder / f"{name}.parquet").write_bytes(content)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    for name in (*contents, *tables):
        files[name] = CorpusFile(f"{name}.parquet", folder / f"{name}.parquet")
    return files


def test_a_bad_file_is_skipped_or_stops(tmp_path: Path) -> None:
    files = bad_files(tmp_path)
    assert len(files) == 11
    for name, file in files.items():
        lines: list[str] = []
        bad = BadData("skip", lines.append)
        assert read(file, bad=bad) == []
        assert (bad.rows, bad.files, len(lines)) == (0, 1, 1), name
        with pytest.raises(DataError) as error:
            read(file, bad=BadData("stop", print))
        for text in (lines[0], str(error.value)):
            assert str(file.path) in text
            assert "\n" not in text


def test_the_log_names_the_first_rows_of_a_file_and_their_number_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [[1]] * 50 + good(0, 5))
    lines: list[str] = []
    bad = BadData("skip", lines.append)
    read(file, bad=bad)
    assert lines == [f"skipped: {file.path} row {row} has 1 tokens, not 5" for row in range(SHOWN)] + [
        f"skipped: 50 rows of {file.path} in all"
    ]
    read(file, bad=bad)  # the next epoch
    assert len(lines) == SHOWN + 1
    assert bad.rows == 100


def test_a_fault_of_the_machine_is_no_bad_data(tmp_path: Path) -> None:
    file = CorpusFile("gone.parquet", tmp_path / "gone.parquet")
    with pytest.raises(DataError, match="cannot be read: "):  # skipping it would change the data of a resumed run
        read(file)


def test_bad_lines_of_jsonl_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}', "not json", '{"text": 3}', "[" * 100_000, '"text"', '{"text": "two"}', '{"text"']
    path.write_text("\n".join(lines))
    reported: list[str] = []
    bad = BadData("skip", reported.append)
    documents = [document.text for _, piece in text_pieces(CorpusFile("a.jsonl", path), bad=bad) for document in piece]
    assert documents == ["one", "two"]
    assert bad.rows == 5
    assert reported[0] == f'skipped: {path} line 2 is not a JSON object with a string "text"'
    assert reported[-1] == f"skipped: 5 rows of {path} in all"


def test_data_of_another_vocabulary_ends_the_run(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [*good(0, 12), *[[V, 1, 2, 3, 4]] * 6000])
    bad = BadData("skip", lambda line: None)
    with pytest.raises(DataError) as error:
        read(file, bad=bad)
    assert f"1000 of the 1012 rows read cannot be used, the last one because {file.path} row 1011 " in str(error.value)
    assert f"has token {V}, outside [0, {V}) of model.vocab_size" in str(error.value)
    assert "\n" not in str(error.value)
    mostly_good = write(tmp_path / "b.parquet", [*good(0, 900), *good(0, 300), *[[1]] * 1100, *good(0, 900)])
    assert len(read(mostly_good, bad=BadData("skip", lambda line: None))) == 2100


# -------------------------------------------------------------------- positions


def test_pieces_are_the_same_from_wherever_reading_starts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", with_bad(good(0, 300)), group=100)
    skip = BadData("skip", lambda line: None)
    pieces = list(parquet_pieces(file, length=S + 1, vocab_size=V, bad=skip))
    for index, (begin, _) in enumerate(pieces):
        again = list(parquet_pieces(file, begin, length=S + 1, vocab_size=V, bad=skip))
        assert [offset for offset, _ in again] == [offset for offset, _ in pieces[index:]]
        for (_, left), (_, right) in zip(again, pieces[index:], strict=True):
            np.testing.assert_array_equal(left, right)


def damaged_inside(path: Path) -> CorpusFile:
    """Row group 2 of 4, of 100 rows each, has a damaged page."""
    file = write(path, with_bad(good(0, 370)), group=100)
    with pq.ParquetFile(path) as table:
        assert table.num_row_groups == 4
        begin = table.metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    return file


def test_a_damaged_page_takes_the_same_rows_from_wherever_reading_starts(tmp_path: Path) -> None:
    file = damaged_inside(tmp_path / "a.parquet")
    bad = BadData("skip", lambda line: None)
    rows = read(file, bad=bad)
    assert rows == list(range(len(rows)))
    assert 150 < len(rows) <= 200
    assert bad.files == 1
    for offset in (0, 64, 100, 164):
        assert read(file, offset) == rows[-len(read(file, offset)) :]
    stop = BadData("stop", print)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(parquet_pieces(file, 120, length=S + 1, vocab_size=V, bad=stop))


def build(folder: Path, policy: str = "skip", report: Callable[[str], None] = lambda line: None, **data: Any) -> Data:
    return build_data(make_config(folder, policy, **data), folder.parent / "run" / "tokenizer", report=report)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three streams: good files with bad rows, a file damaged inside, and every kind of bad file."""
    folder = tmp_path / "rows"
    folder.mkdir()
    bad_files(folder)
    (folder / "whole.parquet").unlink()
    damaged_inside(folder / "damaged.parquet")
    for index in range(12):
        write(folder / f"good{index}.parquet", with_bad(good(400 + 50 * index, 50)), group=20)
    return folder


def test_training_reads_the_good_rows_and_resumes_exactly(folder: Path) -> None:
    lines: list[str] = []
    batches, positions, counts = [], [], []
    with closing((data := build(folder, report=lines.append)).train):
        for _ in range(900):  # more than two epochs
            batches.append(next(data.train)["tokens"])
            positions.append(json.dumps(whole_position([data.train.get_state()])))
            counts.append(data.train.skipped)
    seen = {int(row[0]) for batch in batches for row in batch}
    assert seen >= set(range(400, 1000)) | set(range(150))
    assert counts[-1]["data_rows_skipped"] > 2 * 12 * (len(BAD) + 1)
    assert counts[-1]["data_files_skipped"] >= 2 * 12
    assert sum("good0.parquet row" in line for line in lines) == SHOWN
    with closing((data := build(folder)).train):
        for at in (0, 1, 2, 37, 100, 101, 222, 350, 889):
            data.train.set_state(json.loads(positions[at]))
            for step in range(at + 1, min(at + 12, 900)):
                np.testing.assert_array_equal(next(data.train)["tokens"], batches[step], err_msg=f"{at}, {step}")
                assert data.train.skipped == counts[step], f"restored at {at}, step {step}"
                assert json.dumps(whole_position([data.train.get_state()])) == positions[step]


def test_stop_names_the_file_and_a_stopped_run_resumes_by_skipping(folder: Path) -> None:
    with closing((data := build(folder, "stop")).train), pytest.raises(DataError) as error:
        list(data.train)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    for path in folder.iterdir():  # leave files that go wrong in a second window only
        if not path.name.startswith("good"):
            path.unlink()
    for index in range(8):
        write(folder / f"good{index}.parquet", [*good(400 + 50 * index, 40), [1], *good(440 + 50 * index, 10)])
    with closing((data := build(folder)).train):
        expected = [next(data.train)["tokens"] for _ in range(200)]
    with closing((data := build(folder, "stop")).train):
        positions = []
        with pytest.raises(DataError):
            positions.extend(data.train.get_state() for _ in data.train)
    assert 20 < len(positions) < 199
    with closing((data := build(folder, "skip")).train):
        data.train.set_state(positions[-1])
        for step in range(len(positions), 200):
            np.testing.assert_array_equal(next(data.train)["tokens"], expected[step])


def test_nothing_but_bad_data_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    opened: list[str] = []
    for index in range(50):
        write(folder / f"{index}.parquet", [[1, 2, 3]] * 20)
    with closing((data := build(folder, report=opened.append)).train), pytest.raises(DataError) as error:
        next(data.train)
    assert "no data in 10 file(s)" in str(error.value)  # and not all of them, which might be terabytes
    assert "has 3 tokens, not 5" in str(error.value)
    assert "\n" not in str(error.value)
    assert len({line.split()[1] for line in opened if " row " in line}) == 10
    for path in list(folder.iterdir())[2:]:
        path.unlink()
    with closing((data := build(folder)).train), pytest.raises(DataError, match=r"no data in 2 file\(s\)"):
        next(data.train)


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_one_damaged_file_among_few_is_skipped(tmp_path: Path, streams: int) -> None:
    """It does not end the run where it is all that a stream has."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "good.parquet", good(0, 16))
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(8000))
    with closing((data := build(folder, streams=streams)).train):
        seen = {int(row[0]) for _ in range(120) for row in next(data.train)["tokens"]}
        assert data.train.skipped["data_files_skipped"] > 0
        assert data.train.seen["epochs"] > 1
    assert len(seen) == 16


def test_held_out_data_follows_the_policy(folder: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    write(held_out / "a.parquet", with_bad(good(0, 30)))
    data = build(folder, validation_path=str(held_out))
    assert {int(row[0]) for batch in data.validation for row in batch["tokens"]} <= set(range(30))
    with pytest.raises(DataError, match="held_out"):
        build(folder, "stop", validation_path=str(held_out))
    for child in held_out.iterdir():
        write(child, [[1]] * 9)
    with pytest.raises(DataError, match=r"no data in 1 file\(s\)"):
        build(folder, validation_path=str(held_out))
