"""Dense Huginn 3.5 B (3.565 B parameters): the model and the recipe of the public run of huginn-0125.

    python train_jax.py --config configs/huginn_3_5b.py

From the public launch configuration (seal-rg/recurrent-pretraining, launch_configs/frontier_nebel_512_nodes.yaml):
Adam-atan2 with update clipping, rate 4e-5, decay 4e-5, betas 0.9 and 0.95, 4096 steps of warmup, clipping at 1, 4096
rows of 4096 tokens a step, one depth for a whole step. Its cooldown lies beyond the 800 B tokens (47 684 steps) that
were trained. From arXiv 2502.05171: mean recurrence 32, backpropagation through 8. Ours: bfloat16 moments, and 4096
micro-batches of one sequence where the public run had 4096 accelerators.
Data: rows of 4097 tokens (tomg-group-umd/huginn-dataset, fetched while training runs: 64 GB of disk at most) and their
tokenizer, that of huginn-0125.
Hardware: weights and moments as kept here take 29 GB, the step's bfloat16 copies 14 GB and, with more than one
micro-batch, the sum of gradients 14 GB more.
Expected result: the public run's, arXiv 2502.05171; not repeated here.
"""

from jax_huginn.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RecurrenceConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/huginn_3_5b",
        model=ModelConfig(width=5280, heads=55, kv_heads=55, mlp_width=17920),
        compute=ComputeConfig(unroll=True),
        moe=MoEConfig(experts=0),
        recurrence=RecurrenceConfig(mean=32, backprop_depth=8, lockstep=True),
        train=TrainConfig(steps=47_684, batch_size=4096, sequence_length=4096, micro_batches=4096),
        optimizer=OptimizerConfig(
            name="adam_atan2",
            learning_rate=4e-5,
            weight_decay=4e-5,
            b1=0.9,
            b2=0.95,
            warmup_steps=4096,
            moment_dtype="bfloat16",
        ),
        data=DataConfig(source="hub", path="tomg-group-umd/huginn-dataset", tokenizer="tomg-group-umd/huginn-0125"),
    )
