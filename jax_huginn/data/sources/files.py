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
    # Absent from some Pythons' packages, or not of the standard library: without them machines agree on the corpus.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    # Generated: tables of characters and the help texts, 18 % of the bytes and nothing like code.
    | {"encodings", "pydoc_data"}
)


class DataError(UserError):
    """Data that cannot be used; its text is one line naming the file or value and the mend."""


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus, or the part of it between two line ends."""

    relative_path: str
    """POSIX path relative to the corpus folder: the same on every machine."""
    path: Path
    """Where it lies; of a file on the hub, repository and path, which messages show."""
    begin: int = 0
    """First byte that is read."""
    end: int | None = None
    """Byte before which reading stops; None reads to the end."""
    size: int | None = None
    """Bytes, of a file on the hub; None: as the file system says."""
    digest: str = ""
    """SHA-256, or git's own hash, of a file on the hub."""


def stdlib_files() -> list[TextFile]:
    """The Python sources of the running interpreter's standard library, sorted; without tests and tables: 10 MB."""
    return _files_under(Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_EXCLUDED)


def text_files(path: str, option: str = "data.path") -> list[TextFile]:
    """The .txt, .py (one document each) and .jsonl files (a document per line, field `text`) at a folder or file."""
    return _files_at(path, option, TEXT_SUFFIXES)


def parquet_files(path: str, option: str = "data.path") -> list[TextFile]:
    """The .parquet files at a folder (recursive, sorted) or file."""
    return _files_at(path, option, (".parquet",), empty=True)


def _path_hash(relative_path: str) -> float:
    """A number in [0, 1) drawn from the path by SHA-256."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6], "big") / 2**48


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether the hash of a POSIX relative path puts the file into the validation share `fraction`."""
    return _path_hash(relative_path) < fraction


def split_files(files: list[TextFile], fraction: float) -> tuple[list[TextFile], list[TextFile]]:
    """Training and validation files, by the hash of the relative path.

    Both sides get at least one file: where the hash leaves a side empty, the file with the lowest hash is held out, or
    the one with the highest is trained on. A single text file is split at the line end nearest after its share
    1 - fraction of bytes, its tail held out.
    """
    if fraction == 0:
        return files, []
    if len(files) == 1:
        return _split_one(files[0], fraction)
    ranked = sorted(files, key=lambda file: (_path_hash(file.relative_path), file.relative_path))
    count = sum(is_held_out(file.relative_path, fraction) for file in files)
    held_out = set(ranked[: min(max(count, 1), len(files) - 1)])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def _split_one(file: TextFile, fraction: float) -> tuple[list[TextFile], list[TextFile]]:
    advice = "give more files, or --data.validation_fraction 0"
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


def _files_at(path: str, option: str, suffixes: tuple[str, ...], empty: bool = False) -> list[TextFile]:
    place, wanted = Path(path), " or ".join(suffixes)
    try:
        if place.is_file():
            if place.suffix not in suffixes:
                raise DataError(f"{option}={path!r} is not a {wanted} file")
            files = [TextFile(place.name, place)] if empty or place.stat().st_size else []
        elif place.is_dir():
            files = _files_under(place, suffixes, empty=empty)
        else:
            raise DataError(f"{option}={path!r} does not exist: give a folder or a file with {wanted} data")
    except OSError as error:
        raise DataError(f"{option}={path!r} cannot be read: {error.filename}: {error.strerror}") from None
    if not files:
        raise DataError(f"{option}={path!r} holds no {wanted} data: give a folder that does, or set data.source")
    return files


def _files_under(
    folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset(), empty: bool = False
) -> list[TextFile]:
    """Files below a folder, sorted by their relative POSIX path; a folder that cannot be listed raises.

    Without the `empty` ones: an empty text is no document. An empty parquet file is damaged, which its reader says.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in excluded]
        for path in (Path(parent, name) for name in names if name.endswith(suffixes)):
            if empty or path.stat().st_size:
                files.append(TextFile(path.relative_to(folder).as_posix(), path))
    return sorted(files, key=lambda file: file.relative_path)


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; mend it or take it out") from None
