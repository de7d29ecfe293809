"""When a run stops before its last step: a signal, or the end of the job is near."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

from jax_huginn.config.checks import ConfigError, seconds_of
from jax_huginn.config.schema import CheckpointConfig

SLURM_END = "SLURM_JOB_END_TIME"
"""Environment variable of SLURM: when the job will be killed, in seconds since 1970."""
ENDING, WARNING = (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGUSR1)
Agree = Callable[[str | None], str | None]


class Stop:
    """A context in which the first signal asks for a stop, and a second SIGINT or SIGTERM ends the process at once.

    SIGHUP (a lost terminal) and SIGUSR1 (a cluster's warning) ask for a stop too, as often as they come; SIGHUP not
    under `nohup`, which ignores it. The second SIGINT or SIGTERM meets the system's own action rather than a handler
    of ours, which Python would run only after the compiled step, perhaps minutes later.
    """

    def __init__(
        self,
        deadline: Deadline | None = None,
        agree: Agree = lambda reason: reason,
        say: Callable[[str], None] = lambda _: None,
    ):
        """
        Args:
            agree: what all processes make of their reasons to stop, see `processes.StopVote`.
            say: shows a line; called from the signal handler.
        """
        self.deadline, self.agree, self.say = deadline, agree, say
        self.received: str | None = None

    def __enter__(self) -> Stop:
        signals = [*ENDING, *WARNING]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            signals.remove(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL if each in ENDING else signal.SIG_IGN)
        self.say(f"{self.received}: the run stops after this step and saves; Ctrl-C ends it at once, without a save")

    def requested(self) -> str | None:
        """Why to stop after this step, if at all. The one place where processes agree on it: each asks once a step."""
        if self.received:
            return self.agree(self.received)
        if self.deadline and self.deadline.reached():
            return self.agree(f"the job's end in {self.deadline.lead}")
        return self.agree(None)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Deadline:
    """The moment at which to save and stop: `lead` before the job's end."""

    def __init__(self, end: float, lead: str, now: Callable[[], float] = time.time):
        self.lead, self.now = lead, now
        self.at = end - (seconds_of(lead) or 0)

    def reached(self) -> bool:
        return self.now() >= self.at


def deadline_of(config: CheckpointConfig, environment: Mapping[str, str] = os.environ) -> Deadline | None:
    """The deadline that the options ask for; None without `checkpoint.save_before_timeout`.

    Raises:
        ConfigError: the job's end is unknown, or too near to train at all.
    """
    if not config.save_before_timeout:
        return None
    ends, slurm = [], environment.get(SLURM_END)
    if slurm:
        if not slurm.isdecimal():
            raise ConfigError(f"{SLURM_END}={slurm} is not a time in seconds: unset it and give checkpoint.time_limit")
        ends.append(float(slurm))
    if config.time_limit:
        ends.append(time.time() + (seconds_of(config.time_limit) or 0))
    if not ends:
        raise ConfigError(
            f"checkpoint.save_before_timeout={config.save_before_timeout} needs the job's end: SLURM did not set it "
            f"({SLURM_END}), so give --checkpoint.time_limit, for example 24h"
        )
    deadline = Deadline(min(ends), config.save_before_timeout)
    if deadline.reached():
        raise ConfigError(
            f"checkpoint.save_before_timeout={config.save_before_timeout} leaves no time: the job ends in "
            f"{max(min(ends) - time.time(), 0):.0f} s"
        )
    return deadline
