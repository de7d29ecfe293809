"""Files are found, split and read as promised, and every bad one is named in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.config.schema import DataConfig
from jax_huginn.data.sources import corpus, text
from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import (
    CorpusFile,
    DataError,
    parquet_files,
    stdlib_files,
    text_files,
)
from jax_huginn.data.sources.parquet import parquet_pieces
from jax_huginn.data.sources.split import is_held_out, split_files
from jax_huginn.data.sources.text import text_pieces

STOP = BadData("stop", print)


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return folder


def texts(file: CorpusFile, offset: int = 0) -> list[str]:
    return [document.text for _, documents in text_pieces(file, offset, bad=STOP) for document in documents]


def write_rows(path: Path, rows: list, kind: pa.DataType | None = None, group: int = 10) -> CorpusFile:
    column = pa.array(rows, type=kind or pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column}), path, row_group_size=group)
    return CorpusFile(path.name, path)


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_stdlib_is_sorted_source_without_tests() -> None:
    files = stdlib_files()
    names = [file.relative_path for file in files]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {p for n in names for p in n.split("/")}
    assert 5e6 < sum(file.path.stat().st_size for file in files) < 3e7


def test_held_out_is_the_hash_of_the_path() -> None:
    # Golden values: a changed hash would move training files into old runs' validation split.
    names = ["ast.py", "json/decoder.py", "os.py", "re/_parser.py", "typing.py", "abc.py"]
    assert [is_held_out(name, 0.5) for name in names] == [False, True, False, True, False, False]
    share = np.mean([is_held_out(f"folder/file_{index}.txt", 0.05) for index in range(20_000)])
    assert abs(share - 0.05) < 0.005
    assert not any(is_held_out(name, 0.0) for name in names)


def test_split_shares_no_file_and_loses_none() -> None:
    files = stdlib_files()
    training, held_out = split_files(files, 0.05)
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(files)
    assert all(is_held_out(file.relative_path, 0.05) for file in held_out)
    assert split_files(files, 0.0) == (files, [])


@pytest.mark.parametrize("fraction", [1e-6, 0.5, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_sides_of_a_split_get_a_file(count: int, fraction: float) -> None:
    files = [CorpusFile(f"{index}.txt", Path(f"{index}.txt")) for index in range(count)]
    training, held_out = split_files(files, fraction)
    assert training
    assert held_out
    assert len(training) + len(held_out) == count


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_single_file_is_split_at_a_line_end(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": f"document {index}"}) + "\n" for index in range(1000)]
    path = tmp_path / f"corpus.{suffix}"
    path.write_text("".join(lines))
    (training,), (held_out,) = corpus(DataConfig(source="text", path=str(path), validation_fraction=0.1))
    if suffix == "jsonl":
        assert texts(training) + texts(held_out) == [f"document {index}" for index in range(1000)]
        assert len(texts(held_out)) == pytest.approx(100, abs=3)
    else:
        assert texts(training)[0] + texts(held_out)[0] == "".join(lines)


def test_text_is_read_from_folders(tmp_path: Path) -> None:
    write(tmp_path, b__two_DOT_TXT="two\r\n", a_DOT_py="one\n", c_DOT_md="no", empty_DOT_txt="")
    files = text_files(str(tmp_path))
    assert [file.relative_path for file in files] == ["a.py", "b/two.TXT"]
    assert [texts(file) for file in files] == [["one\n"], ["two\r\n"]]


def test_what_is_read_and_what_is_left_out_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(
        data, a_DOT_txt="a" * 1500, b_DOT_txt="b", c_DOT_txt="c" * 1000, d_DOT_md="no", e_DOT_md="no", empty_DOT_txt=""
    )
    write(data, _DOT_hidden_DOT_txt="no", _DOT_git__config_DOT_txt="no", notes="no", rows_DOT_jsonl_DOT_gz="no")
    write(data, run__config_DOT_json="{}", run__metrics_DOT_jsonl="{}", run__tokenizer__merges_DOT_txt="no")
    write(tmp_path, elsewhere__linked_DOT_txt="linked")
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(data)
    (data / "same.txt").symlink_to(data / "a.txt")
    (data / "broken.txt").symlink_to(data / "missing")
    lines: list[str] = []
    files, _ = corpus(DataConfig(source="text", path=str(data), validation_fraction=0.0), lines.append)
    assert [file.relative_path for file in files] == ["a.txt", "b.txt", "c.txt", "link/linked.txt"]
    (line,) = lines
    assert line.startswith("data: 4 files (2.51 kB) to train on; 0 files (0 B) held out; left out: 2 hidden, 2 .md, ")
    for kind in ("1 run folders", "1 empty", "1 broken links", "1 without a suffix", "1 .gz"):
        assert kind in line
    with pytest.raises(DataError, match="is a run folder"):
        text_files(str(data / "run"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("content", ["Grüße, 世界 🏳️\nab\n" * 40, "ohne Zeilenende, 世界 " * 40, "世" * 400])
def test_a_byte_order_mark_decides_the_encoding(
    tmp_path: Path, encoding: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode(encoding))
    file = CorpusFile("a.txt", path)
    assert "".join(texts(file)) == content
    (training,), (held_out,) = split_files([file], 0.3)
    assert "".join(texts(training) + texts(held_out)) == content
    assert 0.2 < len("".join(texts(held_out))) / len(content) < 0.4


def test_a_marked_jsonl_file_keeps_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one"}\n{"text": "zwölf"}\n'.encode("utf-8-sig"))
    assert texts(CorpusFile("a.jsonl", path)) == ["one", "zwölf"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_text_in_another_encoding_is_bad_data(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("schöne Grüße\n".encode(encoding))
    lines: list[str] = []
    bad = BadData("skip", lines.append)
    assert list(text_pieces(CorpusFile("a.txt", path), bad=bad)) == []
    assert (bad.files, len(lines)) == (1, 1)
    assert lines[0].startswith(f"skipped: {path} is ")
    with pytest.raises(DataError) as error:
        texts(CorpusFile("a.txt", path))
    one_line(error, str(path), "--data.bad_rows skip")
    jsonl = path.with_suffix(".jsonl")
    jsonl.write_bytes('{"text": "good"}\n{"text": "schön"}\n'.encode("latin-1"))
    bad = BadData("skip", lines.append)
    documents = [each.text for _, piece in text_pieces(CorpusFile("a.jsonl", jsonl), bad=bad) for each in piece]
    assert (documents, bad.rows) == (["good"], 1)
    assert lines[1] == f"skipped: {jsonl} line 2 is not UTF-8 (byte 0xf6)"


@pytest.mark.parametrize("content", ["word " * 2000, "x" * 9000, "世" * 5000, f"one\n{'long ' * 900}\nthree\n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_long_lines_come_in_bounded_parts(
    tmp_path: Path, content: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 100)
    path = tmp_path / f"a.{suffix}"
    path.write_text(content if suffix == "txt" else json.dumps({"text": content}))
    file = CorpusFile(path.name, path)
    pieces = list(text_pieces(file, bad=STOP))
    documents = [document for _, piece in pieces for document in piece]
    assert "".join(document.text for document in documents) == content
    assert max(len(document.text) for document in documents) <= 200
    assert [document.begins for document in documents] == [True] + [False] * (len(documents) - 1)
    assert [document.ends for document in documents] == [False] * (len(documents) - 1) + [True]
    for index, (offset, _) in enumerate(pieces):
        assert list(text_pieces(file, offset, bad=STOP)) == pieces[index:]


def test_long_text_is_one_document_in_pieces_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 100)
    content = "".join(f"line {index} äöü\n" for index in range(200))
    (tmp_path / "long.txt").write_text(content)
    file = CorpusFile("long.txt", tmp_path / "long.txt")
    pieces = list(text_pieces(file, bad=STOP))
    documents = [document for _, (document,) in pieces]
    assert "".join(document.text for document in documents) == content
    assert [document.begins for document in documents] == [True] + [False] * (len(documents) - 1)
    assert [document.ends for document in documents] == [False] * (len(documents) - 1) + [True]
    for index, (offset, _) in enumerate(pieces):
        assert list(text_pieces(file, offset, bad=STOP)) == pieces[index:]


def test_jsonl_documents_and_their_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo"}\n\n{"text": "half \\ud800 pair"}\n{"text": ""}\n{"text": 3}\n')
    with pytest.raises(DataError) as error:
        texts(CorpusFile("a.jsonl", path))
    one_line(error, str(path), "line 5")
    path.write_text('{"text": "one\\ntwo"}\n\n{"text": "half \\ud800 pair"}')
    assert texts(CorpusFile("a.jsonl", path)) == ["one\ntwo", "half � pair"]
    path.write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(DataError) as error:
        texts(CorpusFile("a.jsonl", path))
    one_line(error, "line 2")


@pytest.mark.parametrize("source", ["text", "parquet"])
def test_bad_paths_are_named(tmp_path: Path, source: str) -> None:
    cases = {
        "missing": str(tmp_path / "missing"),
        "empty": str(tmp_path / "empty"),
        "other": str(tmp_path / "other.md"),
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.md").write_text("text")
    for path in cases.values():
        with pytest.raises(DataError) as error:
            corpus(DataConfig(source=source, path=path))  # pyright: ignore[reportArgumentType]
        one_line(error, "data.path", path)
    with pytest.raises(DataError) as error:
        corpus(DataConfig(source=source))  # pyright: ignore[reportArgumentType]
    one_line(error, "--data.path")


def test_unreadable_folder_and_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a_DOT_txt="text")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "sub"))

    with monkeypatch.context() as patch:  # the tests may run as root, whom no mode bits stop
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError) as error:
            text_files(str(tmp_path))
        one_line(error, str(tmp_path / "sub"), "Permission denied")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError) as error:
        texts(CorpusFile("a.txt", tmp_path / "a.txt"))
    one_line(error, str(tmp_path / "a.txt"), "Permission denied")


def test_validation_path_inside_the_corpus_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt="a", val__b_DOT_txt="b")
    config = DataConfig(source="text", path=str(tmp_path), validation_path=str(tmp_path / "val"))
    training, held_out = corpus(config)
    assert [file.relative_path for file in training] == ["a.txt"]
    assert [file.relative_path for file in held_out] == ["b.txt"]
    with pytest.raises(DataError) as error:
        corpus(DataConfig(source="text", path=str(tmp_path / "val"), validation_path=str(tmp_path)))
    one_line(error, "data.validation_path")
    with pytest.raises(DataError):
        corpus(DataConfig(source="stdlib", validation_path=str(tmp_path)))


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), 5)])
def test_parquet_rows_from_any_row_on(tmp_path: Path, kind: pa.DataType) -> None:
    rows = np.arange(500).reshape(100, 5)
    file = write_rows(tmp_path / "a.parquet", rows.tolist(), kind, group=30)
    for offset in (0, 1, 29, 30, 64, 99, 100):
        pieces = list(parquet_pieces(file, offset, length=5, vocab_size=500, bad=STOP))
        got = np.concatenate([piece for _, piece in pieces] or [np.zeros((0, 5), np.int32)])
        np.testing.assert_array_equal(got, rows[offset:])
        assert got.dtype == np.int32
        assert [begin for begin, _ in pieces] == [int(piece[0, 0]) // 5 for _, piece in pieces]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "is null"),
        ([1, 2], "has 2 tokens, not 3"),
        ([1, 2, 3, 4], "has 4 tokens, not 3"),
        ([1, None, 3], "null token"),
        ([1, 10, 3], "has token 10, outside [0, 10)"),
        ([1, -1, 3], "has token -1, outside [0, 10)"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: list | None, reason: str) -> None:
    file = write_rows(tmp_path / "a.parquet", [[1, 2, 3]] * 75 + [bad] + [[1, 2, 3]] * 5)
    with pytest.raises(DataError) as error:
        list(parquet_pieces(file, 3, length=3, vocab_size=10, bad=STOP))
    one_line(error, str(file.path), "row 75 ", reason)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"tokens": [[1]]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"input_ids": ["text"]}), tmp_path / "type.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    for name, reason in (("column", "no such column"), ("type", "type string"), ("broken", "cannot be read")):
        file = CorpusFile(name, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError) as error:
            list(parquet_pieces(file, length=1, vocab_size=10, bad=STOP))
        one_line(error, str(file.path), reason)
    (tmp_path / "one").mkdir()
    write_rows(tmp_path / "one" / "a.parquet", [[1]])
    with pytest.raises(DataError) as error:
        split_files(parquet_files(str(tmp_path / "one")), 0.05)
    one_line(error, "--data.validation_fraction 0", "data.validation_path")
