"""The files that a run reads, and their split into training and validation."""

import hashlib
import os
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from jax_huginn.config.checks import UserError

TEXT_SUFFIXES = (".txt", ".py", ".jsonl")
STDLIB_EXCLUDED = frozenset(
    # Not part of the library, or absent from some distributions' packages: excluded so that all machines agree.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    # Generated tables and help texts: 18 % of the bytes, and unlike code.
    | {"encodings", "pydoc_data"}
)


class DataError(UserError):
    """Data that cannot be used. The text is one line: the file or value, and how to fix it."""


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus, or a part between two line ends."""

    relative_path: str
    """POSIX path relative to the corpus folder: the same on every machine."""
    path: Path
    """Where the file is. For a file on the hub: repository and path, as messages show it."""
    begin: int = 0
    """First byte to read."""
    end: int | None = None
    """Byte before which reading stops; None: the end of the file."""
    size: int | None = None
    """Bytes of a file on the hub; None: ask the file system."""
    digest: str = ""
    """SHA-256, or git's SHA-1 of a small file, on the hub."""


def stdlib_files() -> list[CorpusFile]:
    """The sources of the running Python's standard library, sorted, without tests and generated tables: 10 MB."""
    return _files_under(Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_EXCLUDED)


def text_files(path: str, option: str = "data.path") -> list[CorpusFile]:
    """The .txt, .py and .jsonl files in a folder (recursive, sorted), or a single one."""
    return _files_at(path, option, TEXT_SUFFIXES)


def parquet_files(path: str, option: str = "data.path") -> list[CorpusFile]:
    """The .parquet files in a folder (recursive, sorted), or a single one."""
    return _files_at(path, option, (".parquet",), empty=True)


def _path_hash(relative_path: str) -> float:
    """A number in [0, 1) from the SHA-256 of the path."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6], "big") / 2**48


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether a file, by the hash of its POSIX relative path, belongs to the held-out share `fraction`."""
    return _path_hash(relative_path) < fraction


def split_files(files: list[CorpusFile], fraction: float) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """Training and held-out files, by the hash of the relative path.

    Both sides get at least one file: if the hash leaves a side empty, the file with the lowest hash is held out, or the
    one with the highest is trained on. A single text file is split at the first line end after a share 1 - fraction of
    its bytes, and its tail is held out.
    """
    if fraction == 0:
        return files, []
    if len(files) == 1:
        return _split_one(files[0], fraction)
    ranked = sorted(files, key=lambda file: (_path_hash(file.relative_path), file.relative_path))
    count = sum(is_held_out(file.relative_path, fraction) for file in files)
    held_out = set(ranked[: min(max(count, 1), len(files) - 1)])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def _split_one(file: CorpusFile, fraction: float) -> tuple[list[CorpusFile], list[CorpusFile]]:
    advice = "provide more files, or set --data.validation_fraction 0"
    if file.path.suffix == ".parquet":
        raise DataError(f"{file.path} is the only file, so none can be held out: {advice}, or data.validation_path")
    size = file.path.stat().st_size
    with open_file(file.path) as lines:
        lines.seek(max(int((1 - fraction) * size) - 1, 0))
        lines.readline()
        cut = lines.tell()
    if not 0 < cut < size:
        raise DataError(f"{file.path} cannot be split for validation at a line end: {advice}")
    return [replace(file, end=cut)], [replace(file, begin=cut, end=size)]


def _files_at(path: str, option: str, suffixes: tuple[str, ...], empty: bool = False) -> list[CorpusFile]:
    place, wanted = Path(path), " or ".join(suffixes)
    try:
        if place.is_file():
            if place.suffix not in suffixes:
                raise DataError(f"{option}={path!r} is not a {wanted} file")
            files = [CorpusFile(place.name, place)] if empty or place.stat().st_size else []
        elif place.is_dir():
            files = _files_under(place, suffixes, empty=empty)
        else:
            raise DataError(f"{option}={path!r} does not exist: provide a folder or file with {wanted} data")
    except OSError as error:
        raise DataError(f"{option}={path!r} cannot be read: {error.filename}: {error.strerror}") from None
    if not files:
        raise DataError(f"{option}={path!r} contains no {wanted} data: name another folder, or set data.source")
    return files


def _files_under(
    folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset(), empty: bool = False
) -> list[CorpusFile]:
    """Files below a folder, sorted by relative POSIX path. Raises `OSError` for a folder that cannot be listed.

    Empty files are left out unless `empty`: an empty text is no document, while an empty parquet file is damaged and
    its reader reports it.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in excluded]
        for path in (Path(parent, name) for name in names if name.endswith(suffixes)):
            if empty or path.stat().st_size:
                files.append(CorpusFile(path.relative_to(folder).as_posix(), path))
    return sorted(files, key=lambda file: file.relative_path)


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; fix or remove it") from None
