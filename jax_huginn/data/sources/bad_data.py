"""Bad data: skipping, counting and reporting rows, lines and files that cannot be used (`data.bad_rows`)."""

from collections.abc import Callable
from typing import Literal

from jax_huginn.data.sources.files import CorpusFile, DataError

MANY = 1000  # bad rows, if they are also more than the good ones, end the run under either policy
SHOWN = 3  # bad rows reported for each file; the rest are only counted


class BadData:
    """The policy, and the counts of what it skipped.

    Whether a row is bad depends on the row alone, and skipping leaves all positions unchanged, so a resumed run skips
    the same rows. A file is reported once, however often it is read.
    """

    def __init__(self, policy: Literal["skip", "stop"], report: Callable[[str], None]) -> None:
        self._stop, self._report = policy == "stop", report
        self._good = self._bad = 0  # rows read in this session
        self.rows = 0
        """Rows, or lines of .jsonl files, skipped so far."""
        self.files = 0
        """Files skipped so far, from their beginning or from a damaged place on."""
        self.last = ""
        """The latest fault reported."""
        self._in_file: dict[str, int] = {}  # bad rows by file
        self._reported: set[str] = set()  # files read to their end

    def read(self, rows: int) -> None:
        """Count good rows."""
        self._good += rows

    def row(self, file: CorpusFile, place: Callable[[], str], reason: str) -> None:
        """Skip the row at `place` ("row 7", called only if it is reported).

        Raises:
            DataError: the policy is to stop, or most of the rows are bad.
        """
        if self._stop:
            raise DataError(f"{file.path} {place()} {reason}; fix it, or skip such rows with --data.bad_rows skip")
        self.rows += 1
        self._bad += 1
        if self._bad >= MANY and self._bad > self._good:
            raise DataError(
                f"{self._bad} of the {self._bad + self._good} rows read cannot be used, the last one because "
                f"{file.path} {place()} {reason}: was it made for another model.vocab_size or train.sequence_length?"
            )
        name = file.relative_path
        self._in_file[name] = self._in_file.get(name, 0) + 1
        if name not in self._reported and self._in_file[name] <= SHOWN:
            self.last = f"{file.path} {place()} {reason}"
            self._report(f"skipped: {self.last}")

    def file(self, file: CorpusFile, reason: str) -> None:
        """Skip the rest of the file, or raise `DataError`."""
        if self._stop:
            raise DataError(
                f"{file.path} {reason}; fix, convert or remove it, or skip such files with --data.bad_rows skip"
            )
        self.files += 1
        if file.relative_path not in self._reported:
            self.last = f"{file.path} {reason}"
            self._report(f"skipped: {self.last}")
        self.finished(file)

    def finished(self, file: CorpusFile) -> None:
        """Report, when a file was read to its end, how many rows were skipped in it."""
        name = file.relative_path
        count = self._in_file.pop(name, 0)
        if name not in self._reported and count > SHOWN:
            self._report(f"skipped: {count} rows of {file.path} in all")
        self._reported.add(name)
