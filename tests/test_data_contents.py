"""What decides whether a run may resume is what its data contain, not where they are."""

import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from jax_huginn.data.contents import BLOCK_BYTES, BLOCKS, LISTED, contents_of
from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.sources.files import CorpusFile, DataError
from tests.test_data_pipeline import make_config

OPTIONS = {"vocab": 300, "validation_fraction": 0.3, "streams": 2, "shuffle_window": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for index in range(8):
        (folder / "sub" / f"{index}.txt").write_text(f"text number {index} of a folder\n" * 200)
    return folder


def build(folder: Path | str, run: Path, **data: str) -> Data:
    return build_data(make_config(Path(folder), **OPTIONS | data), run / "tokenizer", report=lambda line: None)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def begun(folder: Path, tmp_path: Path) -> tuple[Path, dict, list]:
    """A run folder, the position of its checkpoint, and the batch that comes next."""
    run = tmp_path / "run"
    with closing((data := build(folder, run)).train):
        next(data.train)
        position = json.loads(json.dumps(whole_position([data.train.get_state()])))
        return run, position, next(data.train)["tokens"].tolist()


def resume(folder: Path | str, run: Path, position: dict, **data: str) -> list:
    with closing((resumed := build(folder, run, **data)).train):
        resumed.train.set_state(position)
        return next(resumed.train)["tokens"].tolist()


def test_a_folder_that_was_moved_or_is_spelled_otherwise_resumes(folder, begun, tmp_path, monkeypatch) -> None:
    run, position, expected = begun
    assert resume(f"{folder}/../texts/", run, position) == expected
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "moved")
    assert resume("moved", run, position) == expected
    copied = shutil.copytree(run / "tokenizer", tmp_path / "elsewhere")
    assert resume("moved", run, position, tokenizer=str(copied)) == expected


def test_a_run_inside_its_data_resumes(folder: Path) -> None:
    run = folder / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / ".lock").write_text("")
    with closing((data := build(folder, run)).train):
        next(data.train)
        position, expected = whole_position([data.train.get_state()]), next(data.train)["tokens"].tolist()
    (run / "metrics.jsonl").write_text('{"text": "of the run"}\n')
    assert resume(folder, run, position) == expected


def test_a_refusal_names_the_files_that_differ(folder: Path, begun) -> None:
    run, position, _ = begun
    listed = (run / LISTED).read_bytes()
    edited = next(path for path, *_ in json.loads(listed)["training"])
    text = (folder / edited).read_text()
    (folder / edited).write_text(text.replace("text", "TEXT", 1))  # the same size
    os.utime(folder / edited, (0, 0))
    (folder / "new.txt").write_text("more")
    with pytest.raises(DataError, match="not those of the checkpoint") as error:
        resume(folder, run, position)
    assert f"changed {edited}; new held-out new.txt: restore them" in str(error.value)
    assert "\n" not in str(error.value)
    assert (run / LISTED).read_bytes() == listed  # a refusal changes nothing
    (run / LISTED).unlink()
    with pytest.raises(DataError, match=r"files was \d files, \w+, now"):
        resume(folder, run, position)
    (folder / edited).write_text(text)
    (folder / "new.txt").unlink()
    assert resume(folder, run, position) == begun[2]


def test_a_held_out_file_that_changed_is_refused(folder: Path, begun) -> None:
    run, position, _ = begun
    (held_out, *_), *_ = json.loads((run / LISTED).read_text())["held_out"]
    (folder / held_out).unlink()
    with pytest.raises(DataError, match=f"missing held-out {held_out}"):
        resume(folder, run, position)


def test_other_merges_with_the_same_vocabulary_are_refused(folder: Path, begun, tmp_path: Path) -> None:
    run, position, _ = begun
    other = shutil.copytree(run / "tokenizer", tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    assert settings["model"]["merges"]
    settings["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(settings))
    kept = (run / "tokenizer/tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=f"the tokenizer is not the run's, which is in {run / 'tokenizer'}"):
        resume(folder, run, position, tokenizer=str(other))
    assert (run / "tokenizer/tokenizer.json").read_bytes() == kept
    with closing((data := build(folder, run, tokenizer=str(other))).train):  # a start from nothing takes it
        next(data.train)
    assert (run / "tokenizer/tokenizer.json").read_bytes() != kept


def test_a_digest_reads_small_files_whole_and_a_few_blocks_of_large_ones(tmp_path: Path, monkeypatch) -> None:
    def digest(file: Path) -> str:
        return contents_of([CorpusFile(file.name, file)], [], "").training[0][-1]

    small, large = tmp_path / "small", tmp_path / "large"
    size = BLOCKS * BLOCK_BYTES
    small.write_bytes(bytes(size))
    with large.open("wb") as stream:
        stream.truncate(100 * size)  # a hole, which takes no disk
    before = digest(small), digest(large)
    for place in (0, size // 2, size - 1):
        content = bytearray(size)
        content[place] = 1
        small.write_bytes(content)
        assert digest(small) != before[0]
    for place in (0, 100 * size - 1):
        with large.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"1")
            stream.flush()
            assert digest(large) != before[1]
            stream.seek(place)
            stream.write(b"\0")
    assert digest(large) == before[1]
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda handle, count, place: read.append(count) or pread(handle, count, place))
    digest(large)
    assert sum(read) == size
