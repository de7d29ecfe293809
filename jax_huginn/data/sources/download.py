"""Download one file of a Hugging Face dataset: resumable, retried, verified before use.

Requests go through huggingface_hub's own session, so its endpoint, token, proxies and offline switch apply. Its
`hf_hub_download` is not used: since version 2 it restarts interrupted files, and it compares sizes, not checksums.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jax_huginn.data.sources.files import CorpusFile, DataError

T = TypeVar("T")
ATTEMPTS = 10  # consecutive tries without progress: about six minutes
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0  # seconds; doubled after each try
PROGRESS = 2**20  # bytes; a try that gained this many resets the count of failures
MISMATCHES = 3  # complete downloads with a wrong checksum
CHUNK = 2**20


class StoppedError(Exception):
    """The run ended while a file was being fetched."""


class UnreachableError(DataError):
    """The hub did not answer, or only with a temporary failure."""


class FetchError(Exception):
    """A failed try. `final`: retrying would not help. `wait`: seconds requested by the server."""

    def __init__(self, reason: str, final: bool = False, wait: float = 0.0, offline: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.final, self.wait, self.offline = reason, final, wait, offline

    @classmethod
    def of(cls, error: Exception) -> "FetchError":
        """Summarise what a request raised, without URLs, which may be signed."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        if isinstance(error, FetchError):
            return error
        if isinstance(error, OfflineModeIsEnabled):
            return cls("HF_HUB_OFFLINE is set", final=True, offline=True)
        if (response := getattr(error, "response", None)) is not None:
            return cls.of_status(response)
        # The class depends on the HTTP client of the installed huggingface_hub.
        text = re.sub(r"\w+://\S+", "the hub", (str(error).splitlines() or [""])[0])
        return cls(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    @classmethod
    def of_status(cls, response: Any) -> "FetchError":
        """Summarise an HTTP error status."""
        status = int(response.status_code)
        hint = ": set HF_TOKEN, or accept the dataset's terms" if status in (401, 403) else ""
        transient = status in (408, 425, 429) or status >= 500
        return cls(f"HTTP status {status}{hint}", not transient, _seconds(response.headers.get("Retry-After", "")))


def _seconds(retry_after: str) -> float:
    """Seconds from now in the header, which has seconds or a date; at most ten minutes."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 600.0)


class Patience:
    """Retries after pauses that double, with jitter so that many processes do not return at once."""

    def __init__(self, pause: Callable[[float], None], report: Callable[[str], None], attempts: int = ATTEMPTS) -> None:
        """`pause(seconds)` waits, or raises `StoppedError`."""
        self.pause, self.report, self.attempts = pause, report, attempts

    def failed(self, what: str, fault: FetchError, tries: int) -> None:
        """Wait before the next try, or raise `DataError` after the last."""
        if fault.final:
            kind = UnreachableError if fault.offline else DataError
            raise kind(f"{what} cannot be fetched: {fault.reason}")
        if tries >= self.attempts:
            raise UnreachableError(f"{what} cannot be fetched after {tries} tries: {fault.reason}")
        seconds = max(min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5), fault.wait)
        self.report(f"{what}: {fault.reason}; retrying in {seconds:.0f} s")
        self.pause(seconds)

    def until_done(self, what: str, action: Callable[[], T]) -> T:
        """Retry `action` until it succeeds, and return its result."""
        tries = 0
        while True:
            try:
                return action()
            except StoppedError:
                raise
            except Exception as error:
                tries += 1
                self.failed(what, FetchError.of(error), tries)


def fetch(repository: str, commit: str, file: CorpusFile, part: Path, target: Path, patience: Patience) -> None:
    """Write `target`, complete and verified or not at all; `part` keeps what an interrupted call has fetched.

    Raises:
        DataError: the file cannot be fetched.
        StoppedError: from `patience.pause`.
    """
    assert file.size is not None
    tries = mismatches = 0
    while True:
        before = _size(part)
        try:
            if before < file.size or not part.exists():
                _continue(repository, commit, file, part, patience)
            if _size(part) < file.size:
                raise FetchError(f"ended after {_size(part)} of {file.size} bytes")
            if not is_intact(part, file):
                part.unlink()
                mismatches += 1
                raise FetchError("does not have the checksum that the hub lists", final=mismatches == MISMATCHES)
            os.replace(part, target)
            return
        except StoppedError:
            raise
        except Exception as error:
            tries = 1 if _size(part) >= before + PROGRESS else tries + 1
            patience.failed(str(file.path), FetchError.of(error), tries)


def _continue(repository: str, commit: str, file: CorpusFile, part: Path, patience: Patience) -> None:
    """Request the bytes that `part` lacks."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    assert file.size is not None
    begin = _size(part)
    name = file.path.as_posix().removeprefix(f"{repository}/")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    url = hf_hub_url(repository, name, repo_type="dataset", revision=commit)
    session: Any = get_session()
    with session.stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        if answer.status_code == 416:  # the part is longer than the file
            part.unlink(missing_ok=True)
        if answer.status_code not in (200, 206):
            raise FetchError.of_status(answer)
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            raise FetchError("was sent from another byte than requested")
        with _writing(part, append=answer.status_code == 206) as write:
            have = begin if answer.status_code == 206 else 0
            for chunk in answer.iter_raw():  # unbuffered, so that a dropped connection loses nothing
                have += len(chunk)
                if have > file.size:
                    write(chunk[: len(chunk) - (have - file.size)])
                    return  # the checksum decides whether it is the file
                write(chunk)
                patience.pause(0)


@contextmanager
def _writing(part: Path, append: bool) -> Iterator[Callable[[bytes], Any]]:
    """A function that appends to `part`; a full disk or a missing permission is final."""

    def guarded(action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise FetchError(f"data.cache_dir cannot be written: {error.strerror}", final=True) from None

    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else os.O_TRUNC)
    stream: BinaryIO = guarded(lambda: os.fdopen(os.open(part, flags, 0o644), "wb", buffering=0))
    with stream:
        yield lambda chunk: guarded(lambda: stream.write(chunk))


def is_intact(path: Path, file: CorpusFile) -> bool:
    """Whether the file at `path` has the size and digest of `file`: SHA-256, or git's SHA-1 of a small file."""
    if _size(path) != file.size:
        return False
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.digest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
