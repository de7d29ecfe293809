"""Memory of the host that a step on a CPU uses over and over."""

import ctypes
import os
from pathlib import Path

# Parameters of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
GPUS = ("/dev/nvidiactl", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, on a machine without a GPU; to be called before JAX starts its threads.

    XLA:CPU asks for a step's temporaries anew each step. By default glibc takes buffers of this size from the system
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
