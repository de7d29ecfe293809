"""The order of the data: complete, without doubles, a function of the seed alone, and exactly restored anywhere."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
import pytest

from jax_huginn.data.permutation import EPOCH, SPANS, WINDOW, permutation
from jax_huginn.data.reader import RowReader
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.spans import Spans
from jax_huginn.data.streams import RowDataset, Stream

PIECE = 7  # tokens or rows a piece; prime to every length here
S = 16


def make_corpus(folder: Path, lengths: list[int]) -> tuple[list[CorpusFile], dict[str, np.ndarray]]:
    """Files whose tokens are numbered through the whole corpus, so that every token shows its place."""
    numbers = itertools.count()
    contents = {f"{i:03}.txt": np.array([next(numbers) for _ in range(n)], np.int32) for i, n in enumerate(lengths)}
    for name in contents:
        (folder / name).write_text(name)
    return [CorpusFile(name, folder / name, size=len(tokens)) for name, tokens in contents.items()], contents


class Pieces:
    """Pieces of an in-memory corpus; counts how often it is read."""

    def __init__(self, contents: dict[str, np.ndarray]) -> None:
        self.contents, self.reads = contents, 0

    def __call__(self, file: CorpusFile, offset: int) -> Iterator[tuple[int, np.ndarray]]:
        first, end = file.share or (0, len(self.contents[file.relative_path]))
        for begin in range(max(offset, first), end, PIECE):
            self.reads += 1
            yield begin, self.contents[file.relative_path][begin : min(begin + PIECE, end)]


LENGTHS = [40, 3, 111, 17, 64, 1, 200, 33, 90, 5, 77, 16]


@pytest.fixture
def packed(tmp_path: Path) -> tuple[list[CorpusFile], Pieces]:
    files, contents = make_corpus(tmp_path, LENGTHS)
    return files, Pieces(contents)


def dataset(files: list[CorpusFile], pieces: Pieces, seed: int = 0, streams: int = 3, window: int = 5) -> RowDataset:
    return RowDataset(
        files, pieces, take=S + 1, stride=S, seed=seed, streams=streams, shuffle_window=window, settings={"length": S}
    )


def take(iterator: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.stack([next(iterator) for _ in range(count)])


def test_permutation_is_the_same_on_every_machine() -> None:
    assert permutation(8, 0, SPANS) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(1000, 3, EPOCH, 1, 2)) == list(range(1000))
    orders = {
        tuple(permutation(50, *key))
        for key in ((0, EPOCH, 0, 0), (1, EPOCH, 0, 0), (0, EPOCH, 0, 1), (0, WINDOW, 0, 0))
    }
    assert len(orders) == 4
    first = Counter(permutation(4, seed)[0] for seed in range(400))
    assert min(first.values()) > 60


def test_unshuffled_rows_are_the_packed_corpus_epoch_after_epoch(packed: tuple[list[CorpusFile], Pieces]) -> None:
    files, pieces = packed
    reader = RowReader(Spans(files, seed=5), pieces, S + 1, S, stream=0)
    rows = np.stack([reader.next_row() for _ in range(3 * sum(LENGTHS) // S)])
    expected = np.concatenate(
        [
            pieces.contents[files[i].relative_path]
            for epoch in range(4)
            for i in permutation(len(files), 5, EPOCH, 0, epoch)
        ]
    )
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), expected[: rows.shape[0] * S])
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])  # no label is lost between two rows
    assert not np.array_equal(expected[: sum(LENGTHS)], expected[sum(LENGTHS) : 2 * sum(LENGTHS)])


@pytest.mark.parametrize("window", [1, 4, 1000])
def test_shuffling_keeps_every_epochs_rows_and_windows(packed: tuple[list[CorpusFile], Pieces], window: int) -> None:
    files, pieces = packed
    count = 3 * sum(LENGTHS) // S
    plain, epochs = RowReader(Spans(files, 0), pieces, S + 1, S, 0), []
    rows = []
    for _ in range(count):
        epochs.append(plain.place.epoch)
        rows.append(plain.next_row())
    shuffled = Stream(RowReader(Spans(files, 0), pieces, S + 1, S, 0), window, 0, 0)
    got = [shuffled.next_row() for _ in range(count)]
    begin = 0
    for _, group in itertools.groupby(epochs):
        size = len(list(group))
        for low in range(begin, begin + size, window):
            high = min(low + window, begin + size)
            if high <= count - window:
                assert Counter(map(bytes, got[low:high])) == Counter(map(bytes, rows[low:high]))
        begin += size
    assert (np.array_equal(rows, got)) == (window == 1)


@pytest.mark.parametrize("window", [1, 3, 64])
def test_every_parquet_row_comes_once_an_epoch(tmp_path: Path, window: int) -> None:
    lengths = [10, 1, 30, 7, 8, 20]
    files, contents = make_corpus(tmp_path, lengths)
    rows = {name: np.stack([items, items + 1], axis=1) for name, items in contents.items()}
    dataset = RowDataset(files, Pieces(rows), take=1, stride=1, seed=0, streams=2, shuffle_window=window, settings={})
    got = take(iter(dataset), 400)
    assert got.shape == (400, 2)
    spans = Spans(files, 0, 2)
    for stream in range(2):
        mine, begin, orders = got[stream::2, 0], 0, []  # row j comes from stream j mod V
        for epoch in range(5):
            parts = spans.parts(stream, epoch)
            owned = np.concatenate([contents[part.relative_path][slice(*part.share or (None,))] for part in parts])
            orders.append(mine[begin : begin + len(owned)].tolist())
            assert sorted(orders[-1]) == sorted(owned.tolist())
            begin += len(owned)
        assert len({*map(tuple, orders)}) == 5
    assert sorted(got[:76, 0]) == list(range(76))


def test_every_window_of_every_stream_has_an_order_of_its_own(tmp_path: Path) -> None:
    files, contents = make_corpus(tmp_path, [8 * 20] * 2)
    rows = {name: items[:, None] for name, items in contents.items()}
    iterator = iter(RowDataset(files, Pieces(rows), take=1, stride=1, seed=0, streams=2, shuffle_window=8, settings={}))
    got = take(iterator, 2 * 8 * 20).reshape(20, 8, 2)  # window, row, stream
    orders = {tuple(window - window.min()) for stream in range(2) for window in got[:, :, stream]}
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(orders) == 40


def test_order_is_a_function_of_the_seed(packed: tuple[list[CorpusFile], Pieces]) -> None:
    first, again, other = (take(iter(dataset(*packed, seed=seed)), 100) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (3, 5), (12, 4), (50, 1000)])
def test_restoring_anywhere_gives_the_very_next_rows(
    packed: tuple[list[CorpusFile], Pieces], streams: int, window: int
) -> None:
    iterator = iter(dataset(*packed, streams=streams, window=window))
    states, rows = [iterator.get_state()], []
    for _ in range(150):  # several epochs
        rows.append(next(iterator))
        states.append(iterator.get_state())
    restored = iter(dataset(*packed, streams=streams, window=window))
    for count in [*range(0, 60, 1), 99, 120, 130]:
        restored.set_state(states[count])
        assert whole_position([restored.get_state()]) == whole_position([states[count]])
        for step in range(count, min(count + 20, 150)):
            np.testing.assert_array_equal(next(restored), rows[step], err_msg=f"restored at {count}, row {step}")
            assert restored.get_state()["rows"] == step + 1
    # A restored iterator's later states are as good as any.
    restored.set_state(states[70])
    for step in range(70, 90):
        next(restored)
        fresh = iter(dataset(*packed, streams=streams, window=window))
        fresh.set_state(restored.get_state())
        np.testing.assert_array_equal(next(fresh), rows[step + 1])


def test_restoring_reads_a_window_not_the_history(tmp_path: Path) -> None:
    files, contents = make_corpus(tmp_path, [20_000, 20_000])
    iterator = iter(dataset(files, Pieces(contents), streams=1, window=8))
    take(iterator, 2000)
    pieces = Pieces(contents)
    restored = iter(dataset(files, pieces, streams=1, window=8))
    restored.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(restored), next(iterator))
    assert pieces.reads <= 2 * 8 * S / PIECE + 10


def test_reading_ahead_is_even(tmp_path: Path) -> None:
    files, contents = make_corpus(tmp_path, [50_000])
    pieces = Pieces(contents)
    iterator = iter(dataset(files, pieces, streams=1, window=100))
    next(iterator)
    most = 0
    for _ in range(1000):
        before = pieces.reads
        next(iterator)
        most = max(most, pieces.reads - before)
    assert most <= S // PIECE + 2  # a row's worth, at a window's end too


def test_states_are_small_and_refused_by_another_order(packed: tuple[list[CorpusFile], Pieces]) -> None:
    files, pieces = packed
    iterator = iter(dataset(files, pieces))
    take(iterator, 100)
    state = iterator.get_state()
    assert len(str(state["streams"])) < 100 * 3
    for name, other in (
        ("seed", dataset(files, pieces, seed=1)),
        ("streams", dataset(files, pieces, streams=2)),
        ("shuffle_window", dataset(files, pieces, window=6)),
    ):
        with pytest.raises(DataError, match=f"has {name}=") as error:
            iter(other).set_state(state)
        assert "\n" not in str(error.value)


def test_streams_without_tokens_are_an_error(tmp_path: Path) -> None:
    files, contents = make_corpus(tmp_path, [0, 0, 0])
    with pytest.raises(DataError, match=r"no data in 3 file\(s\)"):
        next(iter(dataset(files, Pieces(contents))))


def test_a_stream_shorter_than_a_row_continues_with_its_next_epochs(tmp_path: Path) -> None:
    files, contents = make_corpus(tmp_path, [5])
    rows = take(iter(dataset(files, Pieces(contents), streams=1, window=4)), 10)
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), np.arange(10 * S) % 5)


def test_prefetching_keeps_order_and_the_state_of_what_was_handed_out(packed: tuple[list[CorpusFile], Pieces]) -> None:
    plain = take(iter(dataset(*packed)), 120).reshape(30, 4, S + 1)
    batches = dataset(*packed).batch(4, drop_remainder=True)
    for buffer in (1, 8):
        iterator = iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=buffer))
        iterator.start_prefetch()
        for step in range(20):
            np.testing.assert_array_equal(next(iterator), plain[step])
            assert iterator.get_state()["rows"] == 4 * (step + 1)
        state = iterator.get_state()
        iterator.close()
        other = iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=3))
        next(other)
        other.set_state(state)
        np.testing.assert_array_equal(take(other, 10), plain[20:30])
        other.close()
