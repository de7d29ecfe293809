"""Tracing some steps of a run."""

import re
from dataclasses import dataclass

from jax_huginn.config.checks import require


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of the device and the host, for TensorBoard, XProf and Perfetto."""

    steps: str = ""
    """Steps to trace into RUN/profile, FIRST:LAST, both traced and counted from 1, for example 10:13. Empty: none."""

    @property
    def range(self) -> range:
        """The steps that are traced."""
        first, last = map(int, self.steps.split(":")) if self.steps else (1, 0)
        return range(first, last + 1)

    def __post_init__(self) -> None:
        require(
            not self.steps or (re.fullmatch(r"\d{1,9}:\d{1,9}", self.steps) is not None and len(self.range) > 0),
            f"profile.steps={self.steps} is not a range of steps: write FIRST:LAST, for example 10:13",
        )
        require(not self.steps or self.range[0] > 0, f"profile.steps={self.steps}: steps are counted from 1")
