"""Stopping on Ctrl-C and SIGTERM after the step at hand."""

import signal
from types import FrameType


class StopSignal:
    """A context in which the first SIGINT or SIGTERM sets `received`; a second one ends the process at once."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
