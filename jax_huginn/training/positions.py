"""Where the last few batches began in the data, so that a bad one can be traced to its file."""

from typing import Any

KEPT = 3  # steps; a record is seen one step late


class Positions:
    """Remembers the data's position before each of the last steps."""

    def __init__(self, data: Any):
        self.data, self.before = data, {}

    def remember(self, step: int) -> None:
        """To be called before the batch of `step` is taken."""
        self.before[step] = self.data.train.position  # not `get_state`: no checkpoint is made of it
        self.before.pop(step - KEPT, None)

    def locate(self, step: int, row: int) -> str:
        """File and place of a row of that step's batch."""
        return self.data.locate(self.before[step], row)
