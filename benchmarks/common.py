"""What every benchmark shares: presets with overrides, timing, and one JSON line a case."""

import dataclasses
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import jax

from jax_huginn.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent


def override(config: Config, settings: Iterable[str]) -> Config:
    """The config with `section.field=value` settings; needs no tyro, so benchmarks run where it is missing."""
    for setting in settings:
        name, value = setting.split("=")
        section_name, field = name.split(".")
        section = getattr(config, section_name)
        kind = get_type_hints(type(section))[field]
        parsed = (
            {"true": True, "false": False}[value] if kind is bool else kind(value) if kind in (int, float) else value
        )
        config = dataclasses.replace(config, **{section_name: dataclasses.replace(section, **{field: parsed})})
    return config


def median_seconds(run: Callable[[], Any], repeats: int, warmup: int = 2, calls: int = 1) -> float:
    """Median wall time of `run`. The device is waited for after so many `calls`; kernels of less than a millisecond
    need several, or what is measured is their launch (0.2 ms on an H100)."""
    for _ in range(warmup):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def report(**case: Any) -> None:
    """Print a case as one JSON line, with the device, the versions and the commit."""
    device = jax.devices()[0]
    line = {**case, "device": device.device_kind, "jax": jax.__version__, "commit": commit()}
    print(json.dumps(line), flush=True)


def commit() -> str:
    """Short hash of the checkout, or $COMMIT where the files came without their history; else `unknown`."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def peak_gigabytes() -> float | None:
    """Most device memory in use since the process began, 1e9 bytes; None where the backend does not say."""
    statistics_of = jax.devices()[0].memory_stats() or {}
    peak = statistics_of.get("peak_bytes_in_use")
    return None if peak is None else peak / 1e9
