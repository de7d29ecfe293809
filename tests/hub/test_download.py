"""The hub's files come whole or not at all, through every fault, in an order that is fixed."""

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hf
import numpy as np
import pytest

from jax_huginn.data.sources import download
from jax_huginn.data.sources.cache import FileCache
from jax_huginn.data.sources.download import FetchError, Patience, fetch
from jax_huginn.data.sources.files import CorpusFile, DataError
from tests.hub.support import (
    FILES,
    HELD_OUT,
    NAME,
    TRAIN,
    build,
    in_cache,
    make_config,
    one_line,
    take,
)
from tests.hub_server import REPOSITORY, Fault, HubServer, digest, serving


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
