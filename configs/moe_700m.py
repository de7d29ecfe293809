"""MoE-Huginn 700 M (0.71 B parameters): width 2048, 8 routed and 1 shared expert at the injection.

    python train_jax.py --config configs/moe_700m.py

Data: rows of 4097 tokens (tomg-group-umd/huginn-dataset, fetched while training runs: 64 GB of disk at most), 512 rows
a step, 47 684 steps = 100 B tokens.
Hardware: 20 bytes a parameter with micro-batches and float32 moments, 14 GB, before activations. Measured on one
H100 80GB with one micro-batch of 4 sequences: 41.4 GB and 19 136 tokens/s.
The recipe, AdamW at 5e-4 with 4096 steps of warmup and a depth for each micro-batch, is a choice of this repository and
not tuned; mean recurrence and backpropagation depth are the public run's.
Expected result: not known; nobody has trained it.
"""

from jax_huginn.config.presets import MoEHuginnConfig700M
from jax_huginn.config.schema import Config


def get_config() -> Config:
    return MoEHuginnConfig700M()
