"""Dense Huginn 3.5 B (3.565 B parameters): the shape of huginn-0125, for comparison and for fine-tuning.

    python train_jax.py --config configs/huginn_3_5b.py --data.tokenizer TOKENIZER_FOLDER

Data and schedule as in moe_3_8b.py.
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
        recurrence=RecurrenceConfig(mean=32, backprop_depth=8),
        train=TrainConfig(steps=47_684, batch_size=4096, sequence_length=4096, micro_batches=4096),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=4096, moment_dtype="bfloat16"),
        data=DataConfig(source="hub", path="tomg-group-umd/huginn-dataset"),
    )
