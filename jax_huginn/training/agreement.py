"""Decisions that all processes of a run must take alike. In one process each is the process's own."""

import jax
import numpy as np


def agree(reason: str | None) -> str | None:
    """The process's reason to stop, or another one's; None where no process has one.

    A collective: every process calls it at the same place.
    """
    if jax.process_count() == 1:
        return reason
    from jax.experimental import multihost_utils

    asked = bool(multihost_utils.process_allgather(np.asarray(reason is not None)).any())
    return (reason or "another process") if asked else None


def of_first_process(value: int) -> int:
    """The value of process 0, which alone looks at the files and changes them. A collective."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
