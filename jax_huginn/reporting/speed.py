"""Speed of training: tokens/s, TFLOP/s and MFU."""

import time

from jax_huginn.config.schema import Config
from jax_huginn.model.flops import peak_flops, training_flops


class Clock:
    """Speed of the steps between two readings; validation and saving are paused out, and so is the first step,
    which compiles."""

    def __init__(self, config: Config, device_kind: str, devices: int = 1):
        peak = peak_flops(device_kind)
        self.config, self.peak = config, peak and peak * devices
        self.tokens = config.train.batch_size * config.train.sequence_length
        self.last: float | None = None
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        self.seconds_per_step = 0.0

    def tick(self, n: float, k: float) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.steps += 1
            self.seconds += now - self.last
            self.flops += self.tokens * training_flops(self.config, n, k)
            self.seconds_per_step = self.seconds / self.steps
        self.last = now

    def read(self) -> dict[str, float]:
        """Tokens/s, TFLOP/s and, on a known device, MFU since the last reading."""
        if not self.steps:
            return {}
        record = {
            "tokens_per_second": self.steps * self.tokens / self.seconds,
            "tflops_per_second": self.flops / self.seconds / 1e12,
        }
        if self.peak:
            record["mfu"] = self.flops / self.seconds / self.peak
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        return record

    def pause(self) -> None:
        self.last = None

    def resume(self) -> None:
        self.last = time.perf_counter()
