"""What the cases on 8 devices share. `tests/test_parallel.py` runs them in a process of its own, whose CPU looks like 8
devices; alone:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/parallel_cases/*_cases.py
"""

import jax
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.parallel.mesh import make_mesh
from tests.support import small_config

assert jax.device_count() >= 8, f"needs 8 devices, has {jax.device_count()}: set the XLA_FLAGS of this docstring"

STEPS = 5
ONE = (1, 1, 1)


def mesh_config(sizes: tuple[int, int, int], dtype: str = "float64", **sections: dict) -> Config:
    """A small model of every part whose batch, width and experts 8 devices can split."""
    defaults: dict[str, dict] = {
        "model": {"dtype": dtype, "param_dtype": dtype, "core_layers": 1, "prelude_layers": 1, "coda_layers": 0},
        "moe": {"experts": 8, "active": 2},
        "recurrence": {"mean": 4, "backprop_depth": 2},
        "train": {"batch_size": 16, "micro_batches": 2, "sequence_length": 16, "seed": 3},
        "optimizer": {"warmup_steps": 2},
        "parallel": dict(zip(("data", "fsdp", "expert"), sizes, strict=True)),
    }
    for name, fields in sections.items():
        defaults[name] = defaults.get(name, {}) | fields
    return small_config(**defaults)


def mesh_of(config: Config):
    parallel = config.parallel
    return make_mesh(config, jax.devices()[: parallel.data * parallel.fsdp * parallel.expert])


def relative(a, b) -> float:
    """Relative L2 distance of two arrays."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300))
