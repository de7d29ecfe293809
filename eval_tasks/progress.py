"""How far an evaluation has come, on stderr: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 10.0  # seconds between two lines at least


@contextmanager
def reading(what: str) -> Iterator[None]:
    """One line before and one after, with the seconds that it took."""
    began = time.monotonic()
    print(f"reading {what}", file=sys.stderr, flush=True)
    yield
    print(f"read in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


class Progress:
    """Counts requests. Off a terminal the first line gives their number, later ones the percentage done."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total, self.done = verb, total, 0
        from tqdm import tqdm  # not before `run` has decided about TQDM_DISABLE, which tqdm reads when it is imported

        self.bar = tqdm(total=total, desc=verb, disable=None)
        self.last = time.monotonic()
        if total:
            self._say(f"{verb} {total} requests")

    def update(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if time.monotonic() - self.last >= PAUSE and self.done < self.total:
            self._say(f"{self.verb} {100 * self.done // self.total} % of {self.total} requests")

    def close(self) -> None:
        self.bar.close()

    def _say(self, text: str) -> None:
        self.last = time.monotonic()
        if self.bar.disable:
            print(text, file=sys.stderr, flush=True)
