"""A trace of some steps, for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax

from jax_huginn.config.schema import ProfileConfig

PROFILE = "profile"


class Trace:
    """Traces the steps of `profile.steps` into RUN/profile; the device's lines carry the model's named scopes."""

    def __init__(self, config: ProfileConfig, run_dir: Path):
        self.steps, self.folder, self.running = config.range, run_dir / PROFILE, False

    def before(self, step: int, pending: Any) -> None:
        """Call before a step is dispatched; waits for `pending` before the first traced step."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True

    def after(self, step: int, result: Any) -> bool:
        """Call after a step is dispatched; true once the trace is complete."""
        if not self.running or step < self.steps[-1]:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
