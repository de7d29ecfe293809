"""Bad data: what becomes of a row, line or file that cannot be used (`data.bad_rows`)."""

from collections.abc import Callable
from typing import Literal

from jax_huginn.data.sources.files import DataError, TextFile

SHOWN = 3  # bad rows of a file that are told one by one


class BadData:
    """The policy, and the count of what it skipped.

    Whether a row is bad is a function of the row alone and skipping leaves every position as it is, so that a resumed
    run skips the same rows. A file is told of once, however often it is read.
    """

    def __init__(self, policy: Literal["skip", "stop"], report: Callable[[str], None]) -> None:
        self._stop, self._report = policy == "stop", report
        self.rows = 0
        """Rows, or lines of a .jsonl file, skipped so far."""
        self.files = 0
        """Files of which nothing, or not the rest, could be read."""
        self.last = ""
        """The latest complaint that was told."""
        self._in_file: dict[str, int] = {}  # bad rows of the files that are being read or were
        self._told: set[str] = set()  # files that were read to their end

    def row(self, file: TextFile, place: Callable[[], str], reason: str) -> None:
        """Skips the row at `place` ("row 7", worked out only to be shown), or raises `DataError`."""
        if self._stop:
            raise DataError(
                f"{file.path} {place()} {reason}; mend it, or go on without such rows by --data.bad_rows skip"
            )
        self.rows += 1
        name = file.relative_path
        self._in_file[name] = self._in_file.get(name, 0) + 1
        if name not in self._told and self._in_file[name] <= SHOWN:
            self.last = f"{file.path} {place()} {reason}"
            self._report(f"skipped: {self.last}")

    def file(self, file: TextFile, reason: str) -> None:
        """Skips the file, or what is left of it, or raises `DataError`."""
        if self._stop:
            raise DataError(
                f"{file.path} {reason}; mend it or take it out, or go on without it by --data.bad_rows skip"
            )
        self.files += 1
        if file.relative_path not in self._told:
            self.last = f"{file.path} {reason}"
            self._report(f"skipped: {self.last}")
        self.read(file)

    def read(self, file: TextFile) -> None:
        """Says that a file was read to its end, and how many of its rows were skipped."""
        name = file.relative_path
        count = self._in_file.pop(name, 0)
        if name not in self._told and count > SHOWN:
            self._report(f"skipped: {count} rows of {file.path} in all")
        self._told.add(name)
