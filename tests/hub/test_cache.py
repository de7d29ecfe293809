"""The cache serves offline runs, resumes downloads, stays bounded and is shared by processes."""

import shutil
import threading
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hf
import numpy as np
import pytest
from huggingface_hub.utils import close_session

from jax_huginn.data.pipeline import build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.cache import FileCache
from jax_huginn.data.sources.files import CorpusFile, DataError
from tests.hub.support import (
    FILES,
    HELD_OUT,
    NAME,
    TRAIN,
    build,
    bytes_in_cache,
    in_cache,
    make_config,
    one_line,
    rows,
    take,
)
from tests.hub_server import REPOSITORY, HubServer, digest


def test_offline_with_a_full_cache_it_runs(
    hub: HubServer, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing((data := build(tmp_path)).train):
        take(data, 80)
    assert len(in_cache(tmp_path)) == 9  # one held-out file is enough
    requests = len(hub.requests)
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    lines: list[str] = []
    for run in ("run", "new"):  # a resumed run, and a new one, which takes the listing of the cache
        with closing((data := build(tmp_path, run=run, report=lines.append)).train):
            np.testing.assert_array_equal(take(data, 120), expected[0])
    assert any("HF_HUB_OFFLINE is set; using the cached listing" in line for line in lines)
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
    hub.http.shutdown()
    hub.http.server_close()  # no network
    close_session()  # nor a connection that is kept alive
    with closing((data := build(tmp_path, run="newer")).train):
        np.testing.assert_array_equal(take(data, 20), expected[0][:20])
    assert len(hub.requests) == requests


def test_offline_without_the_files_it_says_so(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path).train.close()
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    with closing((data := build(tmp_path)).train), pytest.raises(DataError) as error:
        take(data, 120)
    one_line(error, f"{REPOSITORY}/train/", "HF_HUB_OFFLINE is set")
    with pytest.raises(DataError) as error:
        build(tmp_path, cache_dir=str(tmp_path / "empty"), run="new")
    one_line(error, "listing", "HF_HUB_OFFLINE is set")


def test_a_file_damaged_in_the_cache_is_fetched_again(hub: HubServer, tmp_path: Path, expected: Any) -> None:
    with closing((data := build(tmp_path)).train):
        take(data, 80)
    place = in_cache(tmp_path)[digest(FILES[NAME])]
    content = bytearray(place.read_bytes())
    content[500] ^= 1
    place.write_bytes(content)
    lines: list[str] = []
    with closing((data := build(tmp_path, report=lines.append)).train):
        np.testing.assert_array_equal(take(data, 120), expected[0])
    assert place.read_bytes() == FILES[NAME]
    assert [line for line in lines if "damaged" in line] == [
        f"{REPOSITORY}/{NAME} in the cache is damaged and fetched again"
    ]


def test_an_interrupted_download_resumes_in_the_next_session(hub: HubServer, tmp_path: Path) -> None:
    data = build(tmp_path)
    part = tmp_path / "cache" / "owner--rows" / f"{digest(FILES[NAME])}.part"
    part.write_bytes(FILES[NAME][:600])
    with closing(data.train):
        take(data, 120)
    assert [request["range"] for request in hub.downloads(NAME)] == ["bytes=600-"]


MORE = {f"train/more{index}.parquet": rows(40, 50 + index) for index in range(20)}
SIZE = max(len(content) for content in (TRAIN | MORE | HELD_OUT).values())


def test_the_cache_is_bounded_and_keeps_what_a_restart_reads(
    hub: HubServer, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.update(FILES | MORE)
    limit = 11 * SIZE
    with closing((data := build(tmp_path, cache_gb=limit / 1e9)).train):
        most, seen = 0, []
        for step in range(396):
            seen.append(take(data, 1))
            if step % 7 == 0:
                position = whole_position([data.train.get_state()])
                at = step + 1
            most = max(most, bytes_in_cache(tmp_path))
    assert 6 * SIZE < most <= limit
    assert max(len(hub.downloads(path)) for path in MORE) > 1  # what was removed was fetched again
    # Resuming from the last position needs no network for its window: 8 rows of 2 streams are 4 batches.
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    with closing((data := build(tmp_path, cache_gb=limit / 1e9)).train):
        data.train.set_state(position)
        left = 396 - at
        np.testing.assert_array_equal(take(data, left), np.concatenate(seen[at:]))
    assert left > 0


def test_what_must_stay_stays_and_the_longest_unused_goes(tmp_path: Path) -> None:
    files = [CorpusFile(name, Path(name), size=10, digest=digest(name.encode())) for name in "abcdefghijklv"]

    def write(file: CorpusFile, part: Path, target: Path) -> None:
        target.write_bytes(bytes(10))

    def visit(number: int) -> None:
        cache.opens(0, number, files[number : number + 2])
        with cache.open(files[number]):
            cache.handed_out(0, max(number - 1, 0), number)

    def there() -> str:
        names = {file.digest: file.relative_path for file in files}
        return "".join(sorted(names[path.stem] for path in tmp_path.glob("*.parquet")))

    with closing(FileCache(tmp_path, 80, write, print)) as cache:
        with cache.open(files[-1], keep=True):
            pass
        visit(0)
        visit(1)
        cache.saved(0, 0, 1)
        for number in range(2, 10):
            visit(number)
            assert set("abv") <= set(there())  # the last checkpoint's, and the validation's
            assert {files[number - 1].relative_path, files[number].relative_path} <= set(there())  # the window's
            assert len(there()) <= 8
        cache.saved(0, 8, 9)  # a checkpoint: a and b may go
        visit(10)
        visit(11)
        deadline = time.monotonic() + 5
        while "l" not in there() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not set("ab") <= set(there())
        assert set("ijklv") <= set(there())
    with closing(FileCache(tmp_path / "small", 30, write, print)) as cache:  # one window of four files
        for number in range(4):
            cache.opens(0, number, files[number : number + 1])
            with pytest.raises(DataError, match="at once") if number == 3 else nullcontext(), cache.open(files[number]):
                pass
        cache.handed_out(0, 1, 3)
        cache.saved(0, 1, 3)
        with cache.open(files[3]):
            pass


def test_a_cache_that_is_too_small_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        build(tmp_path, cache_gb=8 * min(len(content) for content in TRAIN.values()) / 1e9)
    one_line(error, "data.cache_gb=", "too small: 2 streams, each with 4 files")
    shutil.rmtree(tmp_path / "run")
    hub.update(FILES | MORE)
    with closing((data := build(tmp_path, cache_gb=9 * SIZE / 1e9, shuffle_window=1000)).train):
        with pytest.raises(DataError) as error:  # a window that spans more files than a stream keeps
            take(data, 120)
        one_line(error, "cannot hold the files that the streams need at once", "data.shuffle_window")


def test_a_file_that_another_run_reads_is_not_removed(tmp_path: Path) -> None:
    contents = [rows(5, index) for index in range(2)]
    first, second = (
        CorpusFile(f"{index}.parquet", Path(f"{index}.parquet"), size=len(content), digest=digest(content))
        for index, content in enumerate(contents)
    )

    def write(file: CorpusFile, part: Path, target: Path) -> None:
        target.write_bytes(contents[int(file.relative_path[0])])

    mine, other = (FileCache(tmp_path, max(map(len, contents)), write, print) for _ in range(2))
    with closing(mine), closing(other):
        with mine.open(first) as place:
            with other.open(first):
                pass
            with pytest.raises(DataError, match="cannot hold"), other.open(second):
                pass
            assert place.read_bytes() == contents[0]
        with other.open(second):
            assert not place.exists()
        with mine.open(first) as place:  # which the other run has removed meanwhile
            assert place.read_bytes() == contents[0]


def test_processes_share_a_folder_and_fetch_their_own_files(hub: HubServer, tmp_path: Path, expected: Any) -> None:
    config = make_config(tmp_path)
    parts: list[Any] = [None, None]

    def run(process: int) -> None:
        data = build_data(config, tmp_path / "run" / "tokenizer", report=lambda _: None, process=process, processes=2)
        with closing(data.train):
            parts[process] = (take(data, 120), data.validation)

    threads = [threading.Thread(target=run, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(np.stack([parts[0][0], parts[1][0]], 2).reshape(expected[0].shape), expected[0])
    for _, validation in parts:  # whole on every process
        np.testing.assert_array_equal(validation[0]["tokens"], expected[1][0])
    assert all(len(hub.downloads(path)) == 1 for path in [*TRAIN])
    assert all(len(hub.downloads(path)) <= 1 for path in HELD_OUT)
