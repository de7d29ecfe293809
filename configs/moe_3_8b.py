"""MoE-Huginn 3.8 B (3.82 B parameters): the public Huginn's shape with 8 routed and 1 shared expert at the injection.

    python train_jax.py --config configs/moe_3_8b.py

Everything but the experts is huginn_3_5b.py, so the recipe is that of the public dense run; nothing in it was tuned for
experts, whose number and width are a choice of this repository. Data as there: 800 B tokens.
Hardware: weights and moments as kept here take 31 GB, the step's bfloat16 copies 15 GB and, with more than one
micro-batch, the sum of gradients 15 GB more. Measured on one H100 80GB with micro-batches and AdamW: 65.4 GB and 2737
tokens/s; with --compute.remat dots_except_gate_up 74.6 GB and 2962 tokens/s. On 8 GPUs with --parallel.fsdp 8
--train.micro_batches 512 --compute.remat dots the compiler needs 39.5 GB a GPU, for 256 micro-batches 58 GB.
Expected result: not known; nobody has trained it.
"""

import dataclasses

from huginn_3_5b import get_config as get_dense_config

from jax_huginn.config.schema import Config, MoEConfig


def get_config() -> Config:
    return dataclasses.replace(
        get_dense_config(), run_dir="runs/moe_3_8b", moe=MoEConfig(experts=8, active=2, width=1792)
    )
