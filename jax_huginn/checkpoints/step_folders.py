"""The folders of a run's checkpoints: which there are, which are whole, and how one comes, is set aside and goes.

Every change is one rename, so that a kill at any moment leaves each step either whole or not there:

    checkpoints/<step>/               a checkpoint, complete with checksums.json
    checkpoints/<step>.damaged/       one that was found damaged; kept, never read again and never deleted
    checkpoints/.unfinished/          being written or deleted; of no value, and cleared when the run is opened

checksums.json holds the size and SHA-256 of every other file, and a checksum of every array's values. The first tell,
before anything is parsed, that the files are what was written; the second, after an array is restored, that it is what
was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_huginn.config.checks import UserError

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
UNFINISHED = ".unfinished"
THREADS = 4  # SHA-256 runs at 1.8 GB/s a core
ArraySums = dict[str, dict[str, str]]
"""item ("params", "optimizer") -> name of an array -> checksum of its values, in hexadecimal digits"""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or cannot be written; its text is one line."""


class DamagedError(CheckpointError):
    """A step folder that does not hold what was saved."""

    def __init__(self, step: Path, what: str):
        super().__init__(f"{step} is damaged: {what}")
        self.step, self.what = step, what


# ---- Reading ---------------------------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """The steps of a folder of checkpoints, oldest first."""
    try:
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())
    except FileNotFoundError:
        return []


def verify(step: Path, items: Iterable[str] | None = None) -> ArraySums:
    """Compare a step's files with their checksums; gives the checksums of its arrays.

    Args:
        items: the only subfolders to read, for example ("params", "meta"); all when not given.

    Raises:
        DamagedError: a file that is missing or was changed since the step was saved.
    """
    files, arrays = _read_checksums(step)
    items = items and set(items)
    wanted = [name for name in files if items is None or "/" not in name or name.split("/")[0] in items]

    def check(name: str) -> None:
        file, (size, digest) = step / name, files[name]
        try:
            if file.stat().st_size != size:
                raise DamagedError(step, f"{name} has {file.stat().st_size} bytes, not {size}")
            if _sha256(file) != digest:
                raise DamagedError(step, f"{name} is not what was written")
        except OSError as error:
            raise DamagedError(step, f"{name} cannot be read ({error.strerror})") from None

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, wanted))
    return arrays


def _read_checksums(step: Path) -> tuple[dict[str, tuple[int, str]], ArraySums]:
    try:
        content = json.loads((step / CHECKSUMS).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        arrays = {
            item: {str(name): str(digest) for name, digest in sums.items()} for item, sums in content["arrays"].items()
        }
    except FileNotFoundError:
        raise DamagedError(step, f"it has no {CHECKSUMS}") from None
    except OSError as error:
        raise DamagedError(step, f"{CHECKSUMS} cannot be read ({error.strerror})") from None
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(step, f"{CHECKSUMS} is not what was written") from None
    if content.get("self") != _digest_of(content):
        raise DamagedError(step, f"{CHECKSUMS} is not what was written")
    return files, arrays


def array_sums(step: Path) -> ArraySums:
    """The checksums of a step's arrays, without a look at its other files."""
    return _read_checksums(step)[1]


def newest_good(folder: Path, items: Iterable[str] | None = None) -> tuple[int | None, list[DamagedError]]:
    """The newest step that is whole, and what is wrong with those after it."""
    faults = []
    for step in reversed(steps_in(folder)):
        try:
            verify(folder / str(step), items)
        except DamagedError as fault:
            if not (folder / str(step)).exists():  # retired by the run, which is in training: there is a newer one
                return newest_good(folder, items)
            faults.append(fault)
        else:
            return step, faults
    return None, faults


# ---- Writing ---------------------------------------------------------------------------------------------------------


def seal(folder: Path, arrays: ArraySums) -> None:
    """Write checksums.json into a folder that is complete otherwise."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: [(folder / name).stat().st_size, _sha256(folder / name)] for name in names if name != CHECKSUMS}
    content: dict[str, Any] = {"files": files, "arrays": arrays}
    content["self"] = _digest_of(content)
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def commit(folder: Path, step: Path) -> None:
    """Make a sealed folder the checkpoint `step`, which must not be there."""
    folder.rename(step)
    _sync(step.parent)


def set_aside(step: Path) -> Path:
    """Keep a damaged step out of the way; where it is now."""
    number, kept = 1, step.with_name(f"{step.name}.damaged")
    while kept.exists():
        number += 1
        kept = step.with_name(f"{step.name}.damaged-{number}")
    step.rename(kept)
    _sync(step.parent)
    return kept


def retire(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all steps but the newest `keep` steps and the multiples of `keep_every` (0: of none)."""
    for step in steps_in(folder)[:-keep]:
        if not keep_every or step % keep_every:
            leaving = folder / UNFINISHED / f"{step}.deleted"
            leaving.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(leaving)
    clear(folder)


def clear(folder: Path) -> None:
    """Remove what is unfinished; nothing of it was ever a checkpoint."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    """Digest of the checksums themselves: a lost line must not pass for a file that never was."""
    text = json.dumps({"files": content["files"], "arrays": content["arrays"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
