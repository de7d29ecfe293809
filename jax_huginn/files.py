"""Files and folders that appear whole or not at all, written beside their place and then renamed; digests of them."""

import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` when the block ends, and is deleted when the block fails."""
    unfinished = _beside(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends, and is deleted when the block fails.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    if path.exists():
        raise FileExistsError(17, "exists", str(path))
    unfinished = _beside(path)
    shutil.rmtree(unfinished, ignore_errors=True)  # left behind by a kill
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        for _ in range(20):  # a library's threads may still be writing into it
            shutil.rmtree(unfinished, ignore_errors=True)
            if not unfinished.exists():
                break
            time.sleep(0.05)
        raise


def sha256_of(files: Iterable[Path]) -> str:
    """One digest of several files' contents, in the order of their paths: 64 hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def reason(error: BaseException) -> str:
    """What the operating system said about a failed write; libraries wrap it into other errors and paragraphs."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if found := re.search(r"OS error \d+: ([^\]\[]+?)\]", str(cause)):  # TensorStore's
            return found[1]
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _beside(path: Path) -> Path:
    """A name for the unfinished, no longer than file systems allow."""
    return path.with_name(f".{path.name.encode()[:200].decode(errors='ignore')}.unfinished")
