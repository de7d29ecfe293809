"""The files that a run reads, and how they are found."""

import os
import sysconfig
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jax_huginn.config.checks import UserError

TEXT_SUFFIXES = (".txt", ".py", ".jsonl")
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
RUN_MARKS = (".lock", "metrics.jsonl", "checkpoints")  # beside config.json
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
    share: tuple[int, int] | None = None
    """A stream's part, in bytes from `begin`; None: all. Both cuts are moved to the next line end, or row."""

    @property
    def bytes_to_read(self) -> int:
        """Bytes from `begin` to `end`, whatever a stream's share of them."""
        whole = self.path.stat().st_size if self.size is None else self.size
        return (whole if self.end is None else self.end) - self.begin


def stdlib_files() -> list[CorpusFile]:
    """The sources of the running Python's standard library, sorted, without tests and generated tables: 10 MB."""
    return _files_under(Path(sysconfig.get_path("stdlib")), (".py",), Counter(), excluded=STDLIB_EXCLUDED)


def text_files(path: str, option: str = "data.path", left_out: Counter[str] | None = None) -> list[CorpusFile]:
    """The .txt, .py and .jsonl files in a folder (recursive, sorted), or a single one.

    Args:
        left_out: counts by kind what the folder holds besides.
    """
    return _files_at(path, option, TEXT_SUFFIXES, left_out)


def parquet_files(path: str, option: str = "data.path", left_out: Counter[str] | None = None) -> list[CorpusFile]:
    """The .parquet files in a folder (recursive, sorted), or a single one; `left_out` as in `text_files`."""
    return _files_at(path, option, (".parquet",), left_out, empty=True)


def describe(training: Sequence[CorpusFile], held_out: Sequence[CorpusFile], left_out: Counter[str]) -> str:
    """One line: the files and bytes to train on and to validate on, and what was left out."""
    parts = [f"{_count(training)} to train on", f"{_count(held_out)} held out"]
    if left_out:
        parts.append("left out: " + ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8)))
    return "data: " + "; ".join(parts)


def _count(files: Sequence[CorpusFile]) -> str:
    size = sum(file.bytes_to_read for file in files)
    scale, unit = next(each for each in UNITS if size >= 0.9995 * each[0] or each[0] == 1)
    return f"{len(files)} file{'s' * (len(files) != 1)} ({size / scale:.3g} {unit})"


def _files_at(
    path: str, option: str, suffixes: tuple[str, ...], left_out: Counter[str] | None, empty: bool = False
) -> list[CorpusFile]:
    place, wanted = Path(path), " or ".join(suffixes)
    left_out = Counter() if left_out is None else left_out
    try:
        if place.is_file():
            if place.suffix.lower() not in suffixes:
                raise DataError(f"{option}={path!r} is not a {wanted} file")
            files = [CorpusFile(place.name, place)] if empty or place.stat().st_size else []
        elif _is_run(place):
            raise DataError(f"{option}={path!r} is a run folder: name a folder of data, or another --run_dir")
        elif place.is_dir():
            files = _files_under(place, suffixes, left_out, empty=empty)
        else:
            raise DataError(f"{option}={path!r} does not exist: provide a folder or file with {wanted} data")
    except OSError as error:
        raise DataError(f"{option}={path!r} cannot be read: {error.filename}: {error.strerror}") from None
    if not files:
        besides = f" ({describe([], [], left_out).split('; ')[-1]})" if left_out else ""
        raise DataError(
            f"{option}={path!r} contains no {wanted} data{besides}: name another folder, or set data.source"
        )
    return files


def _files_under(
    folder: Path,
    suffixes: tuple[str, ...],
    left_out: Counter[str],
    *,
    excluded: frozenset[str] = frozenset(),
    empty: bool = False,
) -> list[CorpusFile]:
    """Files below a folder, sorted by relative POSIX path. Raises `OSError` for a folder that cannot be listed.

    Links are followed, but nothing is read twice: a file's or folder's real path is preferred to links to it. Hidden
    names and run folders are left out, and empty files too unless `empty`: an empty text is no document, while an empty
    parquet file is damaged and its reader reports it.
    """

    def fail(error: OSError) -> None:
        raise error

    files: dict[tuple[int, int], Path] = {}
    links: list[Path] = []
    visited: set[tuple[int, int]] = set()
    tops = deque([folder])  # linked folders come after all others
    while tops:
        for parent, folders, names in os.walk(tops.popleft(), onerror=fail):
            if (identity := _identity(Path(parent))) in visited:
                folders.clear()
                continue
            visited.add(identity)
            left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
            below = [Path(parent, name) for name in sorted(folders) if name[0] != "." and name not in excluded]
            left_out["run folders"] += sum(map(_is_run, below))
            below = [path for path in below if not _is_run(path)]
            folders[:] = [path.name for path in below if not path.is_symlink()]
            tops += [path for path in below if path.is_symlink()]
            for path in (Path(parent, name) for name in sorted(names) if name[0] != "."):
                if not path.name.lower().endswith(suffixes):
                    left_out[path.suffix.lower() or "without a suffix"] += 1
                elif not path.exists():
                    left_out["broken links"] += 1
                elif path.is_symlink():
                    links.append(path)
                elif empty or path.stat().st_size:
                    files[_identity(path)] = path
                else:
                    left_out["empty"] += 1
    for path in links:
        files.setdefault(_identity(path), path)
    found = [CorpusFile(path.relative_to(folder).as_posix(), path) for path in files.values()]
    left_out += Counter()  # in place: drops the zeros
    return sorted(found, key=lambda file: file.relative_path)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_run(folder: Path) -> bool:
    """Whether a run wrote this folder: its records are never data."""
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in RUN_MARKS)


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; fix or remove it") from None
