"""The one door through which the training loop reports: records, progress, warnings and speed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.reporting.alarms import Alarms
from jax_huginn.reporting.console import Console, describe
from jax_huginn.reporting.record import Record, detailed_record, in_order, step_record
from jax_huginn.reporting.speed import Speed
from jax_huginn.reporting.writers import make_writers


class Reporter:
    """Reports the steps of a run, in order. Only the first process writes and speaks; all of them raise alarms."""

    def __init__(
        self,
        config: Config,
        console: Console,
        run_dir: Path,
        restored_step: int,
        *,
        first: bool,
        devices: int,
        newest: Callable[[], int | None],
        locate: Callable[[int], str] | None = None,
    ):
        """
        Args:
            restored_step: the records after it are dropped.
            newest: gives the newest checkpoint's step.
            locate: number of a row in the training sequence -> its file and place.
        """
        self.config, self.console, self.begin = config, console, restored_step + 1
        self._writers = make_writers(config, run_dir, restored_step, console.say) if first else []
        self._alarms = Alarms(config, console.say, newest, locate)
        self._speed = Speed(config, jax.local_devices()[0], devices)

    def measure(self, step: int, metrics: Any, depths: tuple[np.ndarray, np.ndarray], counts: Record) -> Record:
        """The record of a step; waits for the step.

        Args:
            metrics: `training.step.StepMetrics`.
            depths: n and k of its micro-batches.
            counts: what its batch adds: tokens seen, bad data.
        """
        host = jax.device_get(metrics)
        n, k = (float(depth.mean()) for depth in depths)
        self._speed.tick(n, k)
        record = step_record(step, host, n, k) | counts
        if self._is_logged(step):
            record |= detailed_record(host) | self._speed.read()
        return record

    def send(self, record: Record) -> None:
        """Write a record, show it, and warn of what it shows.

        Raises:
            BadNumbersError: the run must stop.
        """
        record = in_order(record)
        for writer in self._writers:
            writer.write(record)
        if self.console.live or self._is_logged(record["step"]) or record["step"] == self.begin:
            self.console.progress(record, self._speed.seconds_per_step)
        if losses := describe(record):
            self.console.say(f"step {record['step']}  held out: {losses}")
        self._alarms.see(record)

    def before_save(self, record: Record) -> None:
        """Put all records on the disk, so that a checkpoint never lacks those before it.

        Raises:
            BadNumbersError: the weights are not finite and must not be saved.
        """
        self._alarms.require_finite(record)
        for writer in self._writers:
            writer.flush()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count as training time."""
        with self._speed.paused():
            yield

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.config.train.steps
