"""Where documents and token rows come from: files, their split into training and validation, and reading them.

A file is read in pieces: whole lines of a text file, or some rows of a parquet file. A piece starts at a byte offset or
a row number that a checkpoint can hold, so that going on from it reads one piece again and never a whole corpus.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from jax_huginn.config.schema import DataConfig

TEXT_SUFFIXES = (".txt", ".py", ".jsonl")
PIECE_BYTES = 128 * 1024  # text that is tokenized, and after a restore read again, at once
PIECE_ROWS = 64  # parquet rows that are read at once
STDLIB_EXCLUDED = frozenset(
    # Absent from some Pythons' packages, or not of the standard library: without them machines agree on the corpus.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    # Generated: tables of characters and the help texts, 18 % of the bytes and nothing like code.
    | {"encodings", "pydoc_data"}
)


class DataError(ValueError):
    """Data that cannot be used; its text is one line naming the file or value and the mend."""


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus, or the part of it between two line ends."""

    relative_path: str
    """POSIX path relative to the corpus folder: the same on every machine."""
    path: Path
    begin: int = 0
    """First byte that is read."""
    end: int | None = None
    """Byte before which reading stops; None reads to the end."""


def stdlib_files() -> list[TextFile]:
    """The Python sources of the running interpreter's standard library, sorted; without tests and tables: 10 MB."""
    return _files_under(Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_EXCLUDED)


def text_files(path: str, option: str = "data.path") -> list[TextFile]:
    """The .txt, .py (one document each) and .jsonl files (a document per line, field `text`) at a folder or file."""
    return _files_at(path, option, TEXT_SUFFIXES)


def parquet_files(path: str, option: str = "data.path") -> list[TextFile]:
    """The .parquet files at a folder (recursive, sorted) or file."""
    return _files_at(path, option, (".parquet",))


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
    with _open(file.path) as lines:
        lines.seek(max(int((1 - fraction) * size) - 1, 0))
        lines.readline()
        cut = lines.tell()
    if not 0 < cut < size:
        raise DataError(f"{file.path} cannot be split for validation at a line end: {advice}")
    return [replace(file, end=cut)], [replace(file, begin=cut, end=size)]


def corpus(config: DataConfig) -> tuple[list[TextFile], list[TextFile]]:
    """Training and validation files of a `data` section; the second list is empty only where none is asked for."""
    if config.source == "stdlib":
        if config.validation_path:
            raise DataError(f"data.validation_path={config.validation_path!r} needs data.source=text or parquet")
        return split_files(stdlib_files(), config.validation_fraction)
    find = parquet_files if config.source == "parquet" else text_files
    if not config.path:
        raise DataError(f"data.source={config.source} needs --data.path, a folder or a file")
    files = find(config.path)
    if config.validation_path:
        held_out = find(config.validation_path, "data.validation_path")
        held_out_paths = {file.path.resolve() for file in held_out}  # the one folder may lie within the other
        files = [file for file in files if file.path.resolve() not in held_out_paths]
        if not files:
            raise DataError(
                f"data.validation_path={config.validation_path!r} holds out all of data.path={config.path!r}"
            )
        return files, held_out
    return split_files(files, config.validation_fraction)


def _files_at(path: str, option: str, suffixes: tuple[str, ...]) -> list[TextFile]:
    place, wanted = Path(path), " or ".join(suffixes)
    try:
        if place.is_file():
            if place.suffix not in suffixes:
                raise DataError(f"{option}={path!r} is not a {wanted} file")
            files = [TextFile(place.name, place)] if place.stat().st_size else []
        elif place.is_dir():
            files = _files_under(place, suffixes)
        else:
            raise DataError(f"{option}={path!r} does not exist: give a folder or a file with {wanted} data")
    except OSError as error:
        raise DataError(f"{option}={path!r} cannot be read: {error.filename}: {error.strerror}") from None
    if not files:
        raise DataError(f"{option}={path!r} holds no {wanted} data: give a folder that does, or set data.source")
    return files


def _files_under(folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset()) -> list[TextFile]:
    """Non-empty files below a folder, sorted by their relative POSIX path; a folder that cannot be listed raises."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in excluded]
        for path in (Path(parent, name) for name in names if name.endswith(suffixes)):
            if path.stat().st_size:
                files.append(TextFile(path.relative_to(folder).as_posix(), path))
    return sorted(files, key=lambda file: file.relative_path)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; mend it or take it out") from None


@dataclass(frozen=True)
class Document:
    """A document, or a part of one too long to be tokenized at once."""

    text: str
    begins: bool = True
    ends: bool = True


def text_pieces(file: TextFile, offset: int = 0) -> Iterator[tuple[int, list[Document]]]:
    """Yields (byte offset, documents) from a text file, from `offset` on; 0 means the file's beginning.

    Bytes that are not UTF-8 become U+FFFD. A piece ends at a line end, so that no character is cut in two.
    """
    with _open(file.path) as lines:
        end = lines.seek(0, os.SEEK_END) if file.end is None else file.end
        offset = lines.seek(max(offset, file.begin))
        while offset < end:
            raw, after = [], offset
            while after < min(
                offset + PIECE_BYTES, end
            ):  # not readlines(hint), which reads a line more at the hint itself
                raw.append(lines.readline())
                if not raw[-1]:
                    raise DataError(f"{file.path} became shorter while it was read: leave the data alone during a run")
                after += len(raw[-1])
            if file.path.suffix == ".jsonl":
                yield offset, _json_documents(file.path, offset, raw)
            else:
                text = b"".join(raw).decode("utf-8", errors="replace")
                yield offset, [Document(text, begins=offset == file.begin, ends=after >= end)]
            offset = after


def _json_documents(path: Path, offset: int, lines: list[bytes]) -> list[Document]:
    documents = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", errors="replace"))["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            with _open(path) as before:
                number = before.read(offset).count(b"\n") + index + 1
            raise DataError(f'{path} line {number} is not a JSON object with a string "text": mend the line') from None
        # JSON may hold half a surrogate pair, which has no UTF-8; it becomes U+FFFD like any other broken character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            documents.append(Document(text))
    return documents


def parquet_pieces(
    file: TextFile, offset: int = 0, *, length: int, vocab_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row number, rows (n, length) int32) of column `input_ids` from row `offset` on.

    Raises `DataError` naming file and row for a null row, a row that is not `length` tokens long and a token outside
    [0, vocab_size).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            kind = schema.field("input_ids").type if "input_ids" in schema.names else None
            lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
            if kind is None or not any(check(kind) for check in lists) or not pa.types.is_integer(kind.value_type):
                found = "no such column" if kind is None else f"type {kind}"
                raise DataError(f"{file.path} must have a column input_ids of type list<int>; it has {found}")
            first, groups = 0, list(range(table.num_row_groups))
            while groups and first + table.metadata.row_group(groups[0]).num_rows <= offset:
                first += table.metadata.row_group(groups.pop(0)).num_rows
            if not groups:
                return
            for batch in table.iter_batches(PIECE_ROWS, row_groups=groups, columns=["input_ids"]):
                begin = max(offset - first, 0)
                if begin < len(batch):
                    yield first + begin, _token_rows(file, first + begin, batch.column(0)[begin:], length, vocab_size)
                first += len(batch)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.path} cannot be read as parquet: {reason}; mend it or take it out") from None


def _token_rows(file: TextFile, first: int, column: Any, length: int, vocab_size: int) -> np.ndarray:
    """Rows (n, length) int32 of an Arrow list column, whose row 0 is the file's row `first`."""
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    bad = lengths != length
    if bad.any():
        row = int(np.argmax(bad))
        _bad_row(file, first + row, "is null" if lengths[row] < 0 else f"has {lengths[row]} tokens, not {length}")
    values = column.flatten()
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // length
        _bad_row(file, first + row, "has a null token")
    tokens = values.to_numpy(zero_copy_only=False).reshape(-1, length)
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        row, place = np.argwhere(bad)[0]
        reason = f"has token {tokens[row, place]}, outside [0, {vocab_size}) of model.vocab_size"
        _bad_row(file, first + int(row), reason)
    return tokens.astype(np.int32)


def _bad_row(file: TextFile, row: int, reason: str) -> NoReturn:
    """The one place that decides what becomes of a bad row: it ends the run."""
    raise DataError(
        f"{file.path} row {row} {reason}; rows hold train.sequence_length + 1 tokens: mend the file or the setting"
    )
