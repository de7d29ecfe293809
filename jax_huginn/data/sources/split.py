"""Training and held-out files: by the hash of the relative path, or a single file cut in two."""

import hashlib
from dataclasses import replace

from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.text import line_end


def _path_hash(relative_path: str) -> float:
    """A number in [0, 1) from the SHA-256 of the path."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:6], "big") / 2**48


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Whether a file, by the hash of its POSIX relative path, belongs to the held-out share `fraction`."""
    return _path_hash(relative_path) < fraction


def split_files(files: list[CorpusFile], fraction: float) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """Training and held-out files, by the hash of the relative path.

    Both sides get at least one file: if the hash leaves a side empty, the file with the lowest hash is held out, or the
    one with the highest is trained on. A single text file is cut at the first line end after a share 1 - fraction of
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
    if file.path.suffix.lower() == ".parquet":
        raise DataError(f"{file.path} is the only file, so none can be held out: {advice}, or data.validation_path")
    size = file.path.stat().st_size
    cut = line_end(file.path, int((1 - fraction) * size))
    if not 0 < cut < size:
        raise DataError(f"{file.path} cannot be split for validation at a line end: {advice}")
    return [replace(file, end=cut)], [replace(file, begin=cut, end=size)]
