"""MoE-Huginn in JAX: a depth-recurrent language model with a shared-expert Mixture of Experts."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_huginn.checkpoints.sources import load_checkpoint
    from jax_huginn.config.presets import MoEHuginnConfig700M
    from jax_huginn.config.schema import Config
    from jax_huginn.model.huginn import MoEHuginnModel

__version__ = "0.1.0"
__all__ = ["Config", "MoEHuginnConfig700M", "MoEHuginnModel", "__version__", "load_checkpoint"]

# Loaded on first use, so that the parts without JAX (config, data) can be imported where JAX is missing.
_HOMES = {
    "Config": "jax_huginn.config.schema",
    "MoEHuginnConfig700M": "jax_huginn.config.presets",
    "MoEHuginnModel": "jax_huginn.model.huginn",
    "load_checkpoint": "jax_huginn.checkpoints.sources",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jax_huginn' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
