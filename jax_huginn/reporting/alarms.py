"""Warnings about a run's own numbers: skipped updates, loss spikes, a collapsed router."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from jax_huginn.config.checks import UserError
from jax_huginn.config.schema import Config
from jax_huginn.reporting.record import COLLAPSE_SHARE, Record

WINDOW, FEWEST = 100, 20
"""Steps among which a spike looks for losses to be measured against, and how many it must find."""
SPIKE_SIGMAS, SPIKE_RATIO = 6.0, 1.1
"""A spike is this many robust standard deviations and this ratio above the median of the steps that were no deeper:
where depth pays, a rare shallow step has a high loss. The ratio keeps a very steady loss from warning about nothing."""
NAMED = 4  # rows of a bad micro-batch that are named with their file


class BadNumbersError(UserError):
    """Numbers that training cannot continue from."""


class Alarms:
    """Looks at every record once, in order. A warning is given when an episode begins, not at each of its steps."""

    def __init__(
        self,
        config: Config,
        say: Callable[[str], None],
        newest: Callable[[], int | None],
        locate: Callable[[int], str] | None = None,
    ):
        """
        Args:
            newest: gives the newest checkpoint's step.
            locate: number of a row in the training sequence -> its file and place.
        """
        self.config, self.say, self.newest, self.locate = config, say, newest, locate
        self.streak = 0
        self.losses: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """Depth, n + k, and loss of the last steps."""
        self.spiking = self.collapsed = False

    def see(self, record: Record) -> None:
        """Warn of what a step's record shows.

        Raises:
            BadNumbersError: `train.max_skipped` updates in a row were skipped.
        """
        self._see_skipped(record)
        self._see_loss(record["step"], record["loss"], record["n"] + record["k"])
        if "router_collapse_warning" in record:
            self._see_router(record)

    def require_finite(self, record: Record) -> None:
        """Refuse to save weights that are not finite: no later step could repair them.

        Raises:
            BadNumbersError: they are not finite.
        """
        if not math.isfinite(record["param_norm"]):
            raise BadNumbersError(
                f"step {record['step']}: the weights are not finite, so they are not saved and the run stops; "
                f"{self._last_good()}"
            )

    def _last_good(self) -> str:
        step = self.newest()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"

    def _see_skipped(self, record: Record) -> None:
        if "non_finite" not in record:
            self.streak = 0
            return
        self.streak += 1
        what = f"step {record['step']}: {self._where(record)}"
        if self.streak >= self.config.train.max_skipped:
            raise BadNumbersError(
                f"{what}; {self.streak} updates in a row were skipped (train.max_skipped), so the run stops; "
                f"{self._last_good()}"
            )
        if self.streak == 1:
            self.say(f"warning: {what}; the update is skipped")

    def _where(self, record: Record) -> str:
        """'micro-batch 1 has a loss or a gradient that is not finite (rows 10 to 11 of the training sequence)'."""
        train, bad = self.config.train, record["non_finite"]
        size = train.batch_size // train.micro_batches
        if not bad:
            return "the sum of the micro-batches' gradients is not finite"
        first = record["tokens"] // train.sequence_length - train.batch_size + bad[0] * size
        rows = f"rows {first} to {first + size - 1} of the training sequence"
        if self.locate:
            rows += f": {'; '.join(self.locate(first + row) for row in range(min(size, NAMED)))}"
            rows += "; ..." if size > NAMED else ""
        several = f"micro-batches {', '.join(map(str, bad))} have" if len(bad) > 1 else f"micro-batch {bad[0]} has"
        return f"{several} a loss or a gradient that is not finite ({rows})"

    def _see_loss(self, step: int, loss: float, depth: float) -> None:
        if not math.isfinite(loss):
            return
        alike = [other for other_depth, other in self.losses if other_depth <= depth]
        if len(alike) >= FEWEST:
            median = statistics.median(alike)
            sigma = 1.4826 * statistics.median(abs(each - median) for each in alike)  # of a normal law
            high = loss > max(median + SPIKE_SIGMAS * sigma, median * SPIKE_RATIO)
            if high and not self.spiking:
                self.say(
                    f"warning: step {step}: loss {loss:.4f} is a spike: the median of the last {len(alike)} steps of "
                    f"this depth or less is {median:.4f}, their spread {sigma:.4f}"
                )
            self.spiking = high
        self.losses.append((depth, loss))

    def _see_router(self, record: Record) -> None:
        collapsed = record["router_collapse_warning"]
        if collapsed and not self.collapsed:
            counts = record["expert_counts"]
            self.say(
                f"warning: step {record['step']}: the router collapses: expert {counts.index(max(counts))} gets "
                f"{record['top_expert_usage_pct']:.0f} % of the assignments, more than {100 * COLLAPSE_SHARE:.0f} %"
            )
        self.collapsed = collapsed
