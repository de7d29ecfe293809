"""MoE-Huginn in JAX: a depth-recurrent language model with a shared-expert Mixture of Experts."""

import importlib

# Loaded on first use, so that the parts without JAX (config, data) can be imported where JAX is missing.
_PUBLIC = {
    "MoEHuginnModel": "jax_huginn.model.huginn",
    "MoEHuginnConfig700M": "jax_huginn.config.presets",
    "load_checkpoint": "jax_huginn.checkpoints.sources",
}
__all__ = ["MoEHuginnConfig700M", "MoEHuginnModel", "load_checkpoint"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jax_huginn' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
