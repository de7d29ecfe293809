"""What a person sees while training runs."""

import sys
import time
from typing import Any


class Console:
    """A live line on a terminal, a line per logged step elsewhere."""

    def __init__(self, steps: int):
        self.steps = steps
        self.live = sys.stdout.isatty()
        self.unfinished = False

    def progress(self, record: dict[str, Any], seconds_per_step: float, logged: bool) -> None:
        """Show a step; off a terminal only the logged ones."""
        if not (self.live or logged):
            return
        step = record["step"]
        left = time.strftime("%H:%M:%S", time.gmtime(max(self.steps - step, 0) * seconds_per_step))
        line = f"step {step}/{self.steps}  loss {record['loss']:.4f}  depth {record['n']:g}+{record['k']:g}"
        if "tokens_per_second" in record:
            line += f"  {record['tokens_per_second']:,.0f} tokens/s"
            self.speed = line[line.rindex("  ") :]
        elif hasattr(self, "speed"):
            line += self.speed
        line += f"  {left} left"
        if self.live:
            print(f"\r\x1b[K{line}", end="", flush=True)
            self.unfinished = True
        else:
            print(line, flush=True)

    def say(self, text: str = "") -> None:
        """A line that stays."""
        print(("\n" if self.unfinished else "") + text, flush=True)
        self.unfinished = False
