"""Prepare the process of a training run: everything that changes it as a whole, in one place.

Constructors and imports change nothing global; the entry calls `prepare_process` once, before JAX starts its backend.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax

from jax_huginn.config.schema import Config

MEMORY_SHARE = "0.92"  # of a GPU's memory that JAX reserves; its own default, 0.75, is for a GPU that is shared


def prepare_process(config: Config) -> None:
    """Set environment variables, loggers, hooks and the allocator for training with `config`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it reports at every start that PyTorch is missing
    if config.compute.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    keep_freed_memory()
    silence_failed_saves()


def silence_failed_saves() -> None:
    """Drop the tracebacks that follow a failed write: the run reports each failure itself, in one line.

    Orbax logs one for every failed save and asyncio for its tasks; TensorStore's threads still answer to an event loop
    that is closed by then; TensorBoard's writer thread dies of a full disk.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_answers
    threading.excepthook = _without_tensorboards


def _without_late_answers(unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _without_tensorboards(arguments: Any) -> None:
    if type(arguments.thread).__name__ != "_AsyncWriterThread" or not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


# ---- Compiled programs ----------------------------------------------------------------------------------------------

COMPILED = "compiled"


def keep_compiled(run_dir: Path) -> None:
    """Keep the compiled programs of accelerators in RUN/compiled, unless another folder was set for them.

    A restart then begins in seconds instead of about a minute (docs/performance.md). Not on CPUs: their programs suit
    one model of processor, and compile fast.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str((run_dir / COMPILED).resolve()))


# ---- Freed memory ---------------------------------------------------------------------------------------------------

# Parameters of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
GPUS = ("/dev/nvidiactl", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, on a machine without a GPU; to be called before JAX starts its threads.

    XLA:CPU asks for its temporaries again in each step. By default glibc takes buffers of this size from the system
    and gives them back, so that every step pays for tens of thousands of page faults: a sixth of the default preset's
    time (docs/performance.md). One arena, since the others are too small for such buffers.

    Returns:
        whether it was done; other C libraries are left alone.
    """
    if any(Path(gpu).exists() for gpu in GPUS) and os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other libraries' mallopt may know other numbers
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = {ARENA_MAX: 1, MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1}
    return {mallopt(name, value) for name, value in wanted.items()} == {1}
