"""MoE-Huginn in PyTorch: a readable twin of `jax_huginn`, of which it imports nothing."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import MoEHuginnConfig, MoEHuginnConfig700M
from .model import MoEHuginnModel

__all__ = [
    "CheckpointError",
    "MoEHuginnConfig",
    "MoEHuginnConfig700M",
    "MoEHuginnModel",
    "load_checkpoint",
    "save_checkpoint",
]
