"""Fetching one file of a Hugging Face dataset: resumable, patient with faults, verified before it is used.

The requests go through huggingface_hub's own session, so that its endpoint, token, proxies and offline switch hold. Its
`hf_hub_download` is not used: since version 2 it begins an interrupted file anew, and it compares sizes, not checksums.
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

from jax_huginn.data.sources.files import DataError, TextFile

T = TypeVar("T")
ATTEMPTS = 10  # tries in a row without progress: about six minutes
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0  # seconds; doubled from try to try
PROGRESS = 2**20  # bytes gained by a try that does not count as a failed one
MISMATCHES = 3  # whole files with a wrong checksum
CHUNK = 2**20


class StoppedError(Exception):
    """The run ends while a file is being fetched."""


class UnreachableError(DataError):
    """The hub gave no answer, or none that would be the same tomorrow."""


class FetchError(Exception):
    """A failed try. `final`: another one would not help. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, final: bool = False, wait: float = 0.0, offline: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.final, self.wait, self.offline = reason, final, wait, offline

    @classmethod
    def of(cls, error: Exception) -> "FetchError":
        """Whatever a request raised, in a few words without addresses, which may be signed."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        if isinstance(error, FetchError):
            return error
        if isinstance(error, OfflineModeIsEnabled):
            return cls("HF_HUB_OFFLINE is set", final=True, offline=True)
        if (response := getattr(error, "response", None)) is not None:
            return cls.of_status(response)
        # Its class is that of whichever HTTP client the installed huggingface_hub has.
        text = re.sub(r"\w+://\S+", "the hub", (str(error).splitlines() or [""])[0])
        return cls(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    @classmethod
    def of_status(cls, response: Any) -> "FetchError":
        """An HTTP answer that is no success."""
        status = int(response.status_code)
        hint = ": set HF_TOKEN, or accept the dataset's terms" if status in (401, 403) else ""
        transient = status in (408, 425, 429) or status >= 500
        return cls(f"HTTP status {status}{hint}", not transient, _seconds(response.headers.get("Retry-After", "")))


def _seconds(retry_after: str) -> float:
    """The header's seconds or date as seconds from now, at most ten minutes."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 600.0)


class Patience:
    """Tries again after pauses that double, with jitter so that many processes do not come back at once."""

    def __init__(self, pause: Callable[[float], None], report: Callable[[str], None], attempts: int = ATTEMPTS) -> None:
        """`pause(seconds)` waits, or raises `StoppedError`."""
        self.pause, self.report, self.attempts = pause, report, attempts

    def failed(self, what: str, fault: FetchError, tries: int) -> None:
        """Waits before the next try, or raises `DataError` after the last."""
        if fault.final:
            kind = UnreachableError if fault.offline else DataError
            raise kind(f"{what} cannot be fetched: {fault.reason}")
        if tries >= self.attempts:
            raise UnreachableError(f"{what} cannot be fetched after {tries} tries: {fault.reason}")
        seconds = max(min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5), fault.wait)
        self.report(f"{what}: {fault.reason}; again in {seconds:.0f} s")
        self.pause(seconds)

    def until_done(self, what: str, action: Callable[[], T]) -> T:
        """What `action` returns once it raises nothing."""
        tries = 0
        while True:
            try:
                return action()
            except StoppedError:
                raise
            except Exception as error:
                tries += 1
                self.failed(what, FetchError.of(error), tries)


def fetch(repository: str, commit: str, file: TextFile, part: Path, target: Path, patience: Patience) -> None:
    """Writes `target`, whole and verified or not at all; `part` keeps what an interrupted call has fetched.

    Raises `DataError` where the file cannot be had, `StoppedError` where `patience.pause` does.
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
                raise FetchError("does not have the checksum that the hub says", final=mismatches == MISMATCHES)
            os.replace(part, target)
            return
        except StoppedError:
            raise
        except Exception as error:
            tries = 1 if _size(part) >= before + PROGRESS else tries + 1
            patience.failed(str(file.path), FetchError.of(error), tries)


def _continue(repository: str, commit: str, file: TextFile, part: Path, patience: Patience) -> None:
    """One request for what `part` lacks of the file."""
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
            raise FetchError("was sent from another byte on than asked for")
        with _writing(part, append=answer.status_code == 206) as write:
            have = begin if answer.status_code == 206 else 0
            for chunk in answer.iter_raw():  # as they come: of a dropped connection nothing is lost
                have += len(chunk)
                if have > file.size:
                    write(chunk[: len(chunk) - (have - file.size)])
                    return  # the checksum tells whether it is the file
                write(chunk)
                patience.pause(0)


@contextmanager
def _writing(part: Path, append: bool) -> Iterator[Callable[[bytes], Any]]:
    """A function that writes to the end of `part`; a full disk or a missing permission is a final fault."""

    def guarded(action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise FetchError(f"data.cache_dir cannot be written: {error.strerror}", final=True) from None

    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else os.O_TRUNC)
    stream: BinaryIO = guarded(lambda: os.fdopen(os.open(part, flags, 0o644), "wb", buffering=0))
    with stream:
        yield lambda chunk: guarded(lambda: stream.write(chunk))


def is_intact(path: Path, file: TextFile) -> bool:
    """Whether the file at `path` has the size and the digest of `file`: SHA-256, or git's SHA-1 of a small file."""
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
