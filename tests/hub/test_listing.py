"""A run keeps the listing of its start; no name in it leads out of the cache."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_huginn.config.schema import DataConfig
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.files import DataError
from jax_huginn.data.sources.hub import Listing, read_listing, split_listing
from tests.hub.support import FILES, TRAIN, build, one_line, rows, take
from tests.hub_server import REPOSITORY, Fault, HubServer, digest


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
    other = build(tmp_path, run="other")
    with closing(other.train), pytest.raises(DataError, match=r"files was 8 files, .* now 9 files"):
        other.train.set_state(position)


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
