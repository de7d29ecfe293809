"""The hub's files come whole or not at all, through every fault, into a bounded cache, in an order that is fixed."""

import dataclasses
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import close_session

from jax_huginn.config.schema import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources import download
from jax_huginn.data.sources.cache import FileCache
from jax_huginn.data.sources.download import FetchError, Patience, fetch
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.hub import Listing, read_listing, split_listing
from tests.hub_server import REPOSITORY, Fault, HubServer, digest, serving

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


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[HubServer], None]:
    """Points huggingface_hub at a server, online, with short pauses."""

    def point(hub: HubServer) -> None:
        monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            hf, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(download, "FIRST_PAUSE", 0.005)
        monkeypatch.setattr(download, "LONGEST_PAUSE", 0.02)
        close_session()

    return point


@pytest.fixture
def hub(point_at: Callable[[HubServer], None]) -> Iterator[HubServer]:
    with serving(FILES) as server:
        point_at(server)
        yield server
    close_session()


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


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """What the same files give from a local folder: 120 batches, a few epochs; and the validation's tokens."""
    folder = tmp_path_factory.mktemp("local")
    for path, content in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    local = {"source": "parquet", "path": str(folder / "train"), "validation_path": str(folder / "val")}
    with closing((data := build(folder, **local)).train):
        return take(data, 120), np.stack([batch["tokens"] for batch in data.validation])


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


# -------------------------------------------------------------------- what comes


def test_the_rows_are_those_of_the_same_files_in_a_folder(hub: HubServer, tmp_path: Path, expected: Any) -> None:
    data = build(tmp_path)
    with closing(data.train):
        np.testing.assert_array_equal(take(data, 120), expected[0])
    np.testing.assert_array_equal(np.stack([batch["tokens"] for batch in data.validation]), expected[1])
    assert {request["file"] for request in hub.requests} <= {"", *TRAIN, *HELD_OUT}
    assert all(len(hub.downloads(path)) == 1 for path in TRAIN)  # once, for several epochs


@pytest.mark.parametrize("lfs", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [Fault(drop_after=300), Fault(drop_after=200)],
        [Fault(drop_after=300), Fault(ignore_range=True)],
        [Fault(429, {"Retry-After": "0"}), Fault(503), Fault(500)],
        [Fault(short_by=100)],
        [Fault(flip=700)],
        [Fault(drop_after=300), Fault(flip=10), Fault(drop_after=1)],
        [Fault(stall=0.6)],
    ],
    ids=["dropped", "range-ignored", "refused", "truncated", "flipped", "mixed", "stalled"],
)
def test_faults_change_nothing(
    hub: HubServer, tmp_path: Path, expected: Any, faults: list[Fault], lfs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.lfs = lfs
    hub.faults[NAME] = list(faults)
    hub.faults["val/0.parquet"] = list(faults)
    with closing((data := build(tmp_path)).train):
        np.testing.assert_array_equal(take(data, 40), expected[0][:40])
    assert not hub.faults[NAME]
    requests = hub.downloads(NAME)
    assert len(requests) >= max(len(faults), 2)
    if faults[0].drop_after:
        assert requests[1]["range"] == "bytes=300-"
    if faults[0].short_by:
        assert requests[1]["range"] == f"bytes={len(FILES[NAME]) - 100}-"
    if faults[0].flip:
        assert requests[1]["range"] is None  # a damaged part is worth nothing


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(404), "HTTP status 404"),
        (Fault(403), "HTTP status 403: set HF_TOKEN"),
        (Fault(503), "after 10 tries: HTTP status 503"),
        (Fault(flip=40), "does not have the checksum"),
        (Fault(short_by=1200), f"after 10 tries: ended after {len(FILES[NAME]) - 1200} of {len(FILES[NAME])} bytes"),
        (Fault(stall=0.3), "after 10 tries: ReadTimeout"),
    ],
    ids=["absent", "forbidden", "refused", "flipped", "truncated", "stalled"],
)
def test_a_file_that_cannot_be_had_ends_the_run_in_one_line(
    hub: HubServer, tmp_path: Path, fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(tmp_path)
    monkeypatch.setattr(hf, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1 if fault.stall else 5)
    hub.faults[NAME] = [fault] * 100
    with closing(data.train), pytest.raises(DataError) as error:
        take(data, 120)
    one_line(error, f"{REPOSITORY}/{NAME}", reason)
    assert digest(FILES[NAME]) not in in_cache(tmp_path)


def test_a_wrong_or_cut_file_is_never_parsed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax_huginn.data.pipeline as pipeline

    whole, read = {digest(content): path for path, content in FILES.items()}, []

    def spy(file: CorpusFile, offset: int, *, path: Path, **settings: Any) -> Iterator[Any]:
        read.append(whole[digest(path.read_bytes())])
        return parquet_pieces(file, offset, path=path, **settings)

    from jax_huginn.data.sources.parquet import parquet_pieces

    monkeypatch.setattr(pipeline, "parquet_pieces", spy)
    for path in TRAIN:
        hub.faults[path] = [Fault(flip=50), Fault(drop_after=900), Fault(short_by=7)]
    with closing((data := build(tmp_path)).train):
        take(data, 80)
    assert set(read) >= set(TRAIN)


def test_pauses_double_with_jitter_and_follow_retry_after(tmp_path: Path, hub: HubServer) -> None:
    pauses: list[float] = []
    lines: list[str] = []
    file = CorpusFile(NAME, Path(REPOSITORY, NAME), size=len(FILES[NAME]), digest=digest(FILES[NAME]))
    hub.faults[NAME] = [Fault(429, {"Retry-After": "7"}), *[Fault(503)] * 5]
    download.FIRST_PAUSE, download.LONGEST_PAUSE = 1.0, 4.0
    fetch(REPOSITORY, hub.head, file, tmp_path / "part", tmp_path / "file", Patience(pauses.append, lines.append))
    pauses = [pause for pause in pauses if pause]
    assert pauses[0] == 7
    for pause, middle in zip(pauses[1:], [2, 4, 4, 4, 4], strict=True):
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len(set(pauses)) == 6
    assert lines[0] == f"{REPOSITORY}/{NAME}: HTTP status 429; retrying in 7 s"
    assert FetchError("", wait=download._seconds("Wed, 21 Oct 2015 07:28:00 GMT")).wait == 0


def test_a_fault_of_a_file_that_is_only_next_is_no_end(tmp_path: Path) -> None:
    files = [CorpusFile(name, Path(name), size=1, digest=digest(name.encode())) for name in "ab"]
    failed, lines = threading.Event(), []

    def write(file: CorpusFile, part: Path, target: Path) -> None:
        if file is files[1] and not failed.is_set():
            raise DataError("b cannot be fetched")
        target.write_bytes(file.relative_path.encode())

    def report(line: str) -> None:
        lines.append(line)
        failed.set()

    with closing(FileCache(tmp_path, 10, write, report)) as cache:
        cache.opens(0, 0, files)
        with cache.open(files[0]) as place:
            assert place.read_text() == "a"
        assert failed.wait(5)
        with cache.open(files[1]) as place:
            assert place.read_text() == "b"
    assert lines == ["b cannot be fetched; it is tried again when it is needed"]


# -------------------------------------------------------------------- the listing


def test_a_run_keeps_the_commit_it_started_with(hub: HubServer, tmp_path: Path, expected: Any) -> None:
    with closing((data := build(tmp_path)).train):
        take(data, 10)
        position = whole_position([data.train.get_state()])
    first = hub.head
    hub.update(dict.fromkeys(FILES, rows(40, 999)) | {"train/more.parquet": rows(40, 5)})
    shutil.rmtree(tmp_path / "cache")
    with closing((data := build(tmp_path)).train):
        data.train.set_state(json.loads(json.dumps(position)))
        np.testing.assert_array_equal(take(data, 20), expected[0][10:30])
    saved = read_listing(tmp_path / "run" / "hub_files.json")
    assert (saved.revision, saved.commit) == ("main", first)
    with closing((data := build(tmp_path, run="other")).train), pytest.raises(DataError, match="has files="):
        data.train.set_state(position)


def test_a_listing_is_patient_too(hub: HubServer, tmp_path: Path) -> None:
    hub.faults["revision"] = [Fault(503), Fault(429, {"Retry-After": "0"})]
    build(tmp_path).train.close()
    assert len(read_listing(tmp_path / "run" / "hub_files.json").files) == 10
    hub.faults["revision"] = [Fault(404)]
    with pytest.raises(DataError) as error:
        build(tmp_path, run="other")
    one_line(error, f"the listing of {REPOSITORY} at main cannot be fetched: HTTP status 404")
    hub.faults["revision"] = [Fault(503)] * 5  # no answer: the listing that the cache has is as good
    build(tmp_path, run="another").train.close()
    assert not hub.faults["revision"]


BAD_PATHS = [
    "../outside.parquet",
    "train/../../outside.parquet",
    "/tmp/outside.parquet",
    "train//outside.parquet",
    "./train/outside.parquet",
    "train\\..\\outside.parquet",
    "C:/outside.parquet",
    "train/out\nside.parquet",
    "train/out\0side.parquet",
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_cannot_leave_the_cache(hub: HubServer, tmp_path: Path, path: str) -> None:
    content = rows(3, 3)
    hub.raw_entries = [
        {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
        | {"lfs": {"oid": digest(content), "size": len(content), "pointerSize": 1}}
    ]
    with pytest.raises(DataError) as error:
        build(tmp_path)
    one_line(error, "leads outside", repr(path))
    assert not [name for name in tmp_path.rglob("*") if name.is_file()]
    with pytest.raises(DataError, match="leads outside"):
        Listing(REPOSITORY, "main", "0" * 40, ((path, 1, "0" * 64),))


@pytest.mark.parametrize("wrong", ["../../outside", "", "0" * 63, "/" + "0" * 63, 7])
def test_a_digest_cannot_leave_the_cache(hub: HubServer, tmp_path: Path, wrong: Any) -> None:
    hub.raw_entries = [
        {"type": "file", "path": "train/x.parquet", "size": 1, "oid": wrong, "lfs": None},
    ]
    with pytest.raises(DataError) as error:
        build(tmp_path)
    one_line(error, "train/x.parquet", repr(wrong))


def test_a_kept_listing_is_checked_like_a_new_one(hub: HubServer, tmp_path: Path) -> None:
    build(tmp_path).train.close()
    file = tmp_path / "run" / "hub_files.json"
    good = json.loads(file.read_text())
    for change in (
        {"files": [["../x.parquet", 1, "0" * 64]]},
        {"files": [["x.parquet", 1, "../../x"]]},
        {"files": [["x.parquet", "1", "0" * 64]]},
        {"files": [["x.parquet"]]},
        {"files": None},
        {"repository": "../.."},
        {"repository": "other/rows"},
        {"commit": "main"},
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(DataError) as error:
            build(tmp_path)
        one_line(error)
    for text in ("", "{", "[]", "3", '"text"', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(DataError) as error:
            build(tmp_path)
        one_line(error, "hub_files.json cannot be read")


def test_a_link_planted_in_the_cache_is_not_followed(hub: HubServer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    data = build(tmp_path)
    folder = tmp_path / "cache" / "owner--rows"
    for path in TRAIN:
        (folder / f"{digest(FILES[path])}.part").symlink_to(outside)
    with closing(data.train), pytest.raises(DataError) as error:
        take(data, 1)
    one_line(error, "data.cache_dir cannot be written")
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["", "rows", "../rows", "owner/..", "owner/rows/../x", "https://hub/owner/rows", "a/b/ c\n"]
)
def test_what_is_no_repository_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError) as error:
        build(tmp_path, path=path)
    one_line(error, repr(path))


def test_splits_are_found_by_name_or_else_by_hash() -> None:
    def split(*paths: str, path: str = REPOSITORY, **fields: Any) -> tuple[set[str], set[str]]:
        listing = Listing(REPOSITORY, "main", "0" * 40, tuple((name, 1, "0" * 64) for name in sorted(paths)))
        config = DataConfig(source="hub", path=path, **fields)
        training, held_out = split_listing(listing, path.removeprefix(REPOSITORY).strip("/"), config)
        return {file.relative_path for file in training}, {file.relative_path for file in held_out}

    assert split("train/a.parquet", "val/b.parquet") == ({"train/a.parquet"}, {"val/b.parquet"})
    assert split("data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet") == (
        {"data/train-0.parquet"},
        {"data/validation-0.parquet"},
    )
    assert split("a.parquet", "valid_a.parquet", "valuable.parquet") == (
        {"a.parquet", "valuable.parquet"},
        {"valid_a.parquet"},
    )
    training, held_out = split(*(f"{index}.parquet" for index in range(40)), validation_fraction=0.2)
    assert len(training) + len(held_out) == 40
    assert 3 <= len(held_out) <= 14
    both = ("one/a.parquet", "two/b.parquet")
    assert split(*both, path=f"{REPOSITORY}/one", validation_path="two") == ({both[0]}, {both[1]})
    assert split(*both, validation_path=f"{REPOSITORY}/two") == ({both[0]}, {both[1]})
    for fields in ({"path": f"{REPOSITORY}/three"}, {"validation_path": "three"}):
        with pytest.raises(DataError, match="three"):
            split(*both, **fields)
    with pytest.raises(DataError, match="held out"):
        split("val/b.parquet")


# -------------------------------------------------------------------- the cache


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


def test_an_interrupted_download_goes_on_in_the_next_session(hub: HubServer, tmp_path: Path) -> None:
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
    # Going on from the last position needs no network for its window: 8 rows of 2 streams are 4 batches.
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


# -------------------------------------------------------------------- secrets


def test_no_token_is_sent_elsewhere_logged_or_written(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_verysecrettoken"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.token = token
    lines: list[str] = []
    with serving(FILES) as cdn:
        hub.cdn = cdn.endpoint
        cdn.faults[NAME] = [Fault(drop_after=10), Fault(503), Fault(short_by=3)]
        with closing((data := build(tmp_path, report=lines.append)).train):
            take(data, 80)
        assert {request["authorization"] for request in cdn.requests} == {None}
        assert f"Bearer {token}" in {request["authorization"] for request in hub.requests}
        cdn.faults["train/1.parquet"] = [Fault(503)] * 99
        shutil.rmtree(tmp_path / "cache")
        with closing((data := build(tmp_path, report=lines.append)).train), pytest.raises(DataError) as error:
            take(data, 120)
        lines.append(str(error.value))
    hub.token = "another"
    with pytest.raises(DataError) as error:
        build(tmp_path, run="new", report=lines.append, cache_dir=str(tmp_path / "new"))
    one_line(error, "HTTP status 401: set HF_TOKEN")
    output = capfd.readouterr()
    written = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for text in (
        *lines,
        *written,
        str(error.value),
        output.out,
        output.err,
        repr(dataclasses.asdict(make_config(tmp_path))),
    ):
        assert token not in text
        assert "secret-signature" not in text
        assert cdn.endpoint not in text
