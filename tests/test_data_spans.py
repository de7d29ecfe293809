"""Every token is read equally often, whatever the sizes of files and the numbers of streams and processes."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError, parquet_files, text_files
from jax_huginn.data.sources.parquet import parquet_pieces
from jax_huginn.data.sources.split import split_files
from jax_huginn.data.sources.text import PIECE_BYTES, text_pieces
from jax_huginn.data.spans import Spans
from jax_huginn.data.streams import RowDataset

S = 16


@pytest.mark.parametrize(
    ("sizes", "streams"),
    [
        ([22_000, 160], 8),  # a large file and a small one: dealing whole files read the small one for half of the rows
        ([1_500] * 12, 8),  # did not divide: 17 % unseen after an epoch's rows, 17 % seen twice
        ([9_000], 4),
        ([100, 1, 30, 7, 8_000, 0, 20, 900], 3),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_token_is_read_equally_often(sizes: list[int], streams: int, processes: int) -> None:
    if streams % processes:
        streams += 1
    begins = [0, *itertools.accumulate(sizes)]
    files = [CorpusFile(str(index), Path(str(index)), size=size) for index, size in enumerate(sizes)]

    def pieces(file: CorpusFile, offset: int):
        begin, end = file.share or (0, file.size or 0)
        for low in range(max(offset, begin), end, 50):
            yield low, begins[int(file.relative_path)] + np.arange(low, min(low + 50, end), dtype=np.int32)

    datasets = [
        RowDataset(
            files, pieces, take=S + 1, stride=S, seed=0, streams=streams, shuffle_window=8, settings={},
            process=process, processes=processes, bytes_before=lambda file, piece: piece,
        )
        for process in range(processes)
    ]  # fmt: skip
    shares = [iter(dataset) for dataset in datasets]
    assert datasets[0].epochs(shares[0].get_state()) == 0
    counts, total = np.zeros(begins[-1], int), begins[-1]
    for epoch in range(1, 5):
        while counts.sum() < epoch * total:
            for _ in range(streams // processes):
                for share in shares:
                    np.add.at(counts, next(share)[:-1], 1)
        # At a span's end up to a row of each stream has gone into the next span, and as much is missing.
        assert np.mean(counts != epoch) < 2 * streams * 2 * S / total, np.bincount(counts)
        assert abs(counts - epoch).max() <= 1
        for dataset, share in zip(datasets, shares, strict=True):
            assert dataset.epochs(share.get_state()) == pytest.approx(epoch, abs=9 * S * streams / total)


def corpus(folder: Path) -> None:
    """Texts with cuts in awkward places: long lines, no spaces, characters of many bytes, marks, JSON lines."""
    (folder / "lines.txt").write_text("".join(f"line {number} of the text\n" for number in range(30_000)))
    (folder / "words.txt").write_text("word " * (PIECE_BYTES // 2))
    (folder / "kana.txt").write_text("あいう" * (PIECE_BYTES // 4))
    (folder / "wide.txt").write_bytes(("é wide\n" * 20_000 + "ö" * PIECE_BYTES).encode("utf-16"))
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfa mark\n")
    (folder / "one.py").write_text("x = 1")
    documents = [f"document {number} " * (number % 50) for number in range(2_000)]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


@pytest.mark.parametrize("streams", [1, 2, 7, 64])
@pytest.mark.parametrize("single", [False, True])
def test_an_epoch_of_all_streams_is_every_document_once(tmp_path: Path, streams: int, single: bool) -> None:
    corpus(tmp_path)
    files = text_files(str(tmp_path))
    if single:  # the part of a file that is not held out; its end is a cut too
        files = [split_files([file], 0.5)[0][0] for file in files if file.relative_path not in ("one.py", "marked.txt")]
    bad = BadData("stop", print)
    whole, spans, cuts = {}, Spans(files, 3, streams), 0
    for file in files:
        whole[file.relative_path] = [document for _, each in text_pieces(file, bad=bad) for document in each]
    for epoch in range(2):
        found = defaultdict(list)
        for stream in range(streams):
            parts = spans.parts(stream, epoch)
            cuts += sum(part.share is not None for part in parts)
            for part in parts:
                pieces = list(text_pieces(part, bad=bad))
                found[part.relative_path] += [(begin, document) for begin, each in pieces for document in each]
                for begin, documents in pieces[:: max(len(pieces) // 3, 1)]:  # a place to resume from
                    assert next(text_pieces(part, begin, bad=bad)) == (begin, documents)
        assert set(found) == set(whole)
        for name, documents in found.items():
            documents.sort(key=lambda item: item[0])
            now, then = [[document for _, document in documents], whole[name]]
            assert "".join(document.text for document in now) == "".join(document.text for document in then)
            ends = [sum(each.begins for each in now), sum(each.ends for each in now)]
            assert ends == [sum(each.begins for each in then), sum(each.ends for each in then)]
            assert now[0].begins
            assert now[-1].ends
    assert (cuts > 0) == (streams > 1)


@pytest.mark.parametrize("streams", [1, 2, 7, 64])
def test_an_epoch_of_all_streams_is_every_row_once(tmp_path: Path, streams: int) -> None:
    number = 0
    for index, count in enumerate((200, 3, 1, 77)):
        rows = pa.array([[number + row] * 3 for row in range(count)], pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": rows}), tmp_path / f"{index}.parquet", row_group_size=30)
        number += count
    spans = Spans(parquet_files(str(tmp_path)), 3, streams)
    settings = {"length": 3, "vocab_size": number, "bad": BadData("stop", print)}
    for epoch in range(2):
        got = []
        for stream in range(streams):
            for part in spans.parts(stream, epoch):
                for begin, rows in parquet_pieces(part, **settings):
                    got += rows[:, 0].tolist()
                    np.testing.assert_array_equal(next(parquet_pieces(part, begin, **settings))[1], rows)
        assert sorted(got) == list(range(number))


def test_a_place_of_the_old_order_is_refused_in_one_line(tmp_path: Path) -> None:
    """Whole files were assigned to the streams then; such an order had no version."""
    file = CorpusFile("a", tmp_path, size=100)
    dataset = RowDataset(
        [file], lambda file, offset: iter([(0, np.zeros(100, np.int32))]),
        take=S + 1, stride=S, seed=0, streams=1, shuffle_window=1, settings={},
    )  # fmt: skip
    iterator = iter(dataset)
    position = iterator.get_state()
    del position["order"]["version"]
    with pytest.raises(DataError, match=r"made by another version of this program.*init_from") as error:
        iterator.set_state(position)
    assert "\n" not in str(error.value)
