"""A bounded folder of files fetched from the hub: the next ones come while training reads the current ones.

A file is named by its digest, so that no name in a listing reaches the file system, and gets its name once it is
verified. What is never removed to make room: files that are being read, that a stream reads or is about to read, and
those that a restart from the last position handed to a checkpoint would read again. Of the rest the longest unused
goes.

Several processes and runs may share the folder. One of them fetches a file while the others that want it wait (a lock
file); a file that any of them reads has a shared lock, and is not removed by another.
"""

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_huginn.data.sources.download import StoppedError, is_intact
from jax_huginn.data.sources.files import CorpusFile, DataError

THREADS = 4  # files that are fetched at once
STREAM_FILES = 4  # that a stream may need at once: to restart from, two of the current window, the next
Fetch = Callable[[CorpusFile, Path, Path], None]


class FileCache:
    """Files of one dataset; `open` waits for one, `opens` says which come next."""

    def __init__(self, folder: Path, capacity: int, fetch: Fetch, report: Callable[[str], None]) -> None:
        """`fetch(file, part, target)` writes a verified `target`; `capacity` is in bytes."""
        self._folder, self._capacity, self._fetch, self._report = folder, capacity, fetch, report
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._sizes: dict[str, int] = {}  # bytes on disk by digest, whole files and parts
        self._whole: dict[str, bool] = {}  # digests of whole files; True once verified in this session
        self._order: list[str] = []  # those digests, the longest unused first
        self._loading: set[str] = set()
        self._failed: dict[str, Exception] = {}
        self._wanted: Counter[str] = Counter()  # waited for
        self._open: Counter[str] = Counter()
        self._kept: set[str] = set()
        self._files: dict[str, CorpusFile] = {}
        self._coming: dict[int, Sequence[CorpusFile]] = {}  # by stream: the current file and the next
        self._visits: dict[int, dict[int, str]] = {}  # by stream: the digest of the file of each visit
        self._handed_out: dict[int, int] = {}  # by stream: first visit of the window of the last batch handed out
        self._saved: dict[int, tuple[int, int]] = {}  # by stream: visits that a restart would read

    # ---------------------------------------------------------------- what is read

    def own(self, streams: int, training: Sequence[CorpusFile], held_out: Sequence[CorpusFile]) -> None:
        """Counts which files are there. `DataError` where the capacity cannot hold what this process's streams need."""
        sizes = sorted((file.size or 0 for file in training), reverse=True)
        need = min(streams * sum(sizes[:STREAM_FILES]), sum(sizes))
        need += max((file.size or 0 for file in held_out), default=0)
        if need > self._capacity:
            raise DataError(
                f"data.cache_gb={self._capacity / 1e9:g} is too small: {streams} streams, each with "
                f"{STREAM_FILES} files at once, and a held-out file need {need / 1e9:.3g}: raise it or lower "
                "data.streams"
            )
        found = []
        for file in [*held_out, *training]:
            for path in (self._path(file.digest), self._part(file.digest)):
                if file.digest not in self._sizes and path.exists():
                    status = path.stat()
                    self._sizes[file.digest] = status.st_size
                    found.append((status.st_mtime, file.digest, path.suffix != ".part"))
        for _, digest, whole in sorted(found):
            self._order.append(digest)
            if whole:
                self._whole[digest] = False

    def opens(self, stream: int, visit: int, files: Sequence[CorpusFile]) -> None:
        """Stream `stream` reads files[0] now, as its `visit`-th file, and files[1] next."""
        with self._changed:
            self._coming[stream] = files
            visits = self._visits.setdefault(stream, {})
            visits[visit] = files[0].digest
            for later in [number for number in visits if number > visit]:  # the stream was set back
                del visits[later]
            self._changed.notify_all()
        self._start()

    @contextmanager
    def open(self, file: CorpusFile, keep: bool = False) -> Iterator[Path]:
        """The file's place on this machine, once it is there and verified; it stays there while it is open.

        `keep`: afterwards too. Raises `DataError` where it cannot be had.
        """
        while True:
            self._wait(file, keep)
            try:
                stream = self._path(file.digest).open("rb")
            except OSError:
                stream = None
            try:
                if stream and self._hold(stream.fileno(), file.digest):
                    yield self._path(file.digest)
                    return
            finally:
                if stream:
                    stream.close()
                with self._changed:
                    self._open[file.digest] -= 1
                    self._changed.notify_all()
            with self._changed:  # another process has removed it
                self._whole.pop(file.digest, None)

    def handed_out(self, stream: int, first: int, last: int) -> None:
        """The last batch handed out belongs to a window that begins in visit `first`; `last` was being read then."""
        if self._handed_out.get(stream) != first:
            with self._changed:
                self._handed_out[stream] = first
                self._saved.setdefault(stream, (first, last))
                self._forget(stream)

    def saved(self, stream: int, first: int, last: int) -> None:
        """A checkpoint holds this position: resuming from it reads the visits `first` to `last` again."""
        with self._changed:
            self._saved[stream] = (first, last)
            self._forget(stream)

    def close(self) -> None:
        """Stops the threads; what they have fetched of a file stays for the next session."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=1)  # one that waits for the network ends with the process

    def pause(self, seconds: float) -> None:
        """Waits, or raises `StoppedError` after `close`."""
        with self._changed:
            if not self._stopped and seconds:
                self._changed.wait_for(lambda: self._stopped, seconds)
            if self._stopped:
                raise StoppedError

    # ---------------------------------------------------------------- names and locks

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.parquet"

    def _part(self, digest: str) -> Path:
        return self._folder / f"{digest}.part"

    def _hold(self, handle: int, digest: str) -> bool:
        """Takes a shared lock on an open file; False if its name has gone meanwhile."""
        fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path(digest)))
        except FileNotFoundError:
            return False

    # ---------------------------------------------------------------- fetching

    def _wait(self, file: CorpusFile, keep: bool) -> None:
        digest = file.digest
        with self._changed:
            self._files[digest] = file
            self._wanted[digest] += 1
            self._failed.pop(digest, None)  # what failed in the background is tried again when it is needed
            if keep:
                self._kept.add(digest)
            self._start()
            self._changed.notify_all()
            try:
                while not self._whole.get(digest) and not self._stopped and digest not in self._failed:
                    self._changed.wait()
                if self._stopped:
                    raise DataError("the run ends")
                if digest in self._failed:
                    raise self._failed.pop(digest)
                self._open[digest] += 1
                self._touch(digest)
            finally:
                self._wanted[digest] -= 1

    def _touch(self, digest: str) -> None:
        if digest in self._order:
            self._order.remove(digest)
        self._order.append(digest)
        with suppress(OSError):
            os.utime(self._path(digest))

    def _start(self) -> None:
        with self._changed:
            if self._threads or self._stopped:
                return
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (file := self._choose()) is None and not self._stopped:
                    self._changed.wait()
                if self._stopped or file is None:
                    return
                self._loading.add(file.digest)
                self._sizes[file.digest] = file.size or 0  # reserved
            fault: Exception | None = None
            try:
                self._obtain(file)
            except StoppedError:
                return
            except OSError as error:
                fault = DataError(f"data.cache_dir={str(self._folder)!r} cannot be used: {error.strerror or error}")
            except Exception as error:
                fault = error
            with self._changed:
                self._loading.discard(file.digest)
                self._touch(file.digest)
                if fault is None:
                    self._whole[file.digest] = True
                else:
                    self._failed[file.digest] = fault
                    self._sizes[file.digest] = _size(self._part(file.digest))
                background = not self._wanted[file.digest]
                self._changed.notify_all()
            if fault and background:
                self._report(f"{fault}; it is tried again when it is needed")

    def _choose(self) -> CorpusFile | None:
        """The file to fetch next, for which there is room: one that is waited for, a current one, a next one."""
        ranks = [[self._files[digest] for digest, count in self._wanted.items() if count]]
        ranks += [[files[rank] for files in self._coming.values() if rank < len(files)] for rank in range(2)]
        for rank, files in enumerate(ranks):
            for file in files:
                digest = file.digest
                if self._whole.get(digest) or digest in self._loading or digest in self._failed:
                    continue
                if self._make_room((file.size or 0) - self._sizes.get(digest, 0), digest, needed=rank == 0):
                    return file
                if rank == 0:
                    self._failed[digest] = DataError(
                        f"data.cache_gb={self._capacity / 1e9:g} cannot hold the files that the streams need at once "
                        f"({sum(self._sizes.values()) / 1e9:.3g}, and {file.path}): raise it, or lower data.streams "
                        "or data.shuffle_window"
                    )
                    self._changed.notify_all()
        return None

    def _obtain(self, file: CorpusFile) -> None:
        """Makes sure of a verified file under its name."""
        from filelock import FileLock, Timeout

        path = self._path(file.digest)
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._folder / f"{file.digest}.lock")
        while not lock.is_locked:
            self.pause(0)
            with suppress(Timeout):  # another process is fetching it
                lock.acquire(timeout=0.2)
        try:
            if path.exists():
                if is_intact(path, file):
                    return
                self._report(f"{file.path} in the cache is damaged and fetched again")
                path.unlink()
            self._fetch(file, self._part(file.digest), path)
        finally:
            lock.release()

    # ---------------------------------------------------------------- room

    def _forget(self, stream: int) -> None:
        """Drops the visits that neither the last batch nor a restart needs."""
        first = min(self._handed_out.get(stream, 0), self._saved.get(stream, (0, 0))[0])
        visits = self._visits.get(stream, {})
        for visit in [visit for visit in visits if visit < first]:
            del visits[visit]
        self._changed.notify_all()

    def _needed(self) -> set[str]:
        """Digests of the files that must stay."""
        needed = self._kept | self._loading | {digest for digest, count in self._open.items() if count > 0}
        for stream, visits in self._visits.items():
            handed_out, saved = self._handed_out.get(stream, 0), self._saved.get(stream)
            for visit, digest in visits.items():
                if visit >= handed_out or (saved and saved[0] <= visit <= saved[1]):
                    needed.add(digest)
        return needed

    def _make_room(self, size: int, digest: str, needed: bool) -> bool:
        """Removes unneeded files until `size` more bytes fit; files that are only next go if the file is `needed`."""
        excess = sum(self._sizes.values()) + size - self._capacity
        if excess <= 0:
            return True
        stay = self._needed() | {digest} | {other for other, count in self._wanted.items() if count}
        following = {file.digest for files in self._coming.values() for file in files} - stay
        free = [other for other in self._order if other not in stay and other not in following]
        free += [other for other in self._order if other in following] if needed else []
        if sum(self._sizes[other] for other in free) < excess:
            return False
        for other in free:
            if excess > 0 and self._remove(other):
                excess -= self._sizes.pop(other)
                self._order.remove(other)
                self._whole.pop(other, None)
        return excess <= 0

    def _remove(self, digest: str) -> bool:
        """Removes a file and its part; False where another process reads it."""
        self._part(digest).unlink(missing_ok=True)
        try:
            with self._path(digest).open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path(digest).unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
