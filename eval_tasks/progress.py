"""How far an evaluation has come, on stderr: a bar on a terminal, lines elsewhere."""

import sys
import time

from tqdm import tqdm

PAUSE = 10.0  # seconds between two lines at least


class Progress:
    """Counts requests. Off a terminal the first line gives their number, later ones the percentage done."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total, self.done = verb, total, 0
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
