"""What every benchmark shares: its command line, timing, and one JSON line per case."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_huginn.config.cli import OneLineParser, split_options

ROOT = Path(__file__).resolve().parent.parent


def parse(parser: OneLineParser) -> tuple[argparse.Namespace, list[str]]:
    """The options of `parser`, and overrides of the config as the trainer takes them: `--section.field value`, or here
    also `--set section.field=value ...`."""
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="changes the config")
    own, overrides = split_options(sys.argv[1:])
    options = parser.parse_args(own)
    return options, [*overrides, *(f"--{setting}" for setting in options.set)]


def median_seconds(run: Callable[[], Any], repeats: int, warmup: int = 2, calls: int = 1) -> float:
    """Median wall time of `run`, which is called `calls` times before waiting for the device. A kernel of less than a
    millisecond needs several calls, or its launch is measured instead (0.2 ms on an H100)."""
    for _ in range(warmup):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def report(**case: Any) -> None:
    """Print a case as one JSON line."""
    print(case_line(**case), flush=True)


def case_line(**case: Any) -> str:
    """A case as one JSON line, with the device, the versions and the commit."""
    device = jax.devices()[0]
    return json.dumps({**case, "device": device.device_kind, "jax": jax.__version__, "commit": commit()})


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
