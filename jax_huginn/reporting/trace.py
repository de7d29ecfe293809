"""Traces of some steps."""

from pathlib import Path
from typing import Any

import jax

from jax_huginn.config.schema import ProfileConfig

PROFILE = "profile"


class Profile:
    """Traces the steps of `profile.steps` into RUN/profile; the model's named scopes are on the device's lines."""

    def __init__(self, config: ProfileConfig, run_dir: Path):
        self.steps, self.folder, self.running = config.range, run_dir / PROFILE, False

    def before(self, step: int, pending: Any) -> None:
        """To be called before a step is dispatched; waits for what was dispatched before the first traced one."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True

    def after(self, step: int, result: Any) -> bool:
        """To be called after a step is dispatched; whether the trace is complete now."""
        if not self.running or step < self.steps[-1]:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
