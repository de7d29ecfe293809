"""Speed of training: tokens/s, TFLOP/s, MFU and peak memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax_huginn.config.schema import Config
from jax_huginn.model.flops import peak_flops, training_flops
from jax_huginn.reporting.record import Record


class Speed:
    """Measures the steps between two readings; validation, saving and the first step, which compiles, do not count."""

    def __init__(self, config: Config, device: Any, devices: int = 1):
        """`device`: the `jax.Device` of this process that represents all `devices`."""
        peak = peak_flops(device.device_kind)
        self.config, self.device, self.peak = config, device, peak and peak * devices
        self.tokens = config.train.batch_size * config.train.sequence_length
        self.last: float | None = None
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        self.seconds_per_step: float | None = None
        """None until a step was measured."""

    def tick(self, n: float, k: float) -> None:
        """Count a step of n recurrences without and k with gradient, which is complete now."""
        now = time.perf_counter()
        if self.last is not None:
            self.steps += 1
            self.seconds += now - self.last
            self.flops += self.tokens * training_flops(self.config, n, k)
            self.seconds_per_step = self.seconds / self.steps
        self.last = now

    def read(self) -> Record:
        """The speed since the last reading; empty if no step was measured."""
        memory = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        record = {"peak_memory_gb": memory / 1e9} if memory else {}
        if not self.steps:
            return record
        record["tokens_per_second"] = self.steps * self.tokens / self.seconds
        record["tflops_per_second"] = self.flops / self.seconds / 1e12
        if self.peak:
            record["mfu"] = self.flops / self.seconds / self.peak
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        return record

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count as training."""
        self.last = None
        try:
            yield
        finally:
            self.last = time.perf_counter()
