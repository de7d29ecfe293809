"""MoE-Huginn 3.8 B (3.82 B parameters): the public Huginn's shape with 8 routed and 1 shared expert at the injection.

    python train_jax.py --config configs/moe_3_8b.py --data.tokenizer TOKENIZER_FOLDER

Data: rows of 4097 tokens (tomg-group-umd/huginn-dataset, fetched while training runs: 64 GB of disk at most), 4096 rows
a step, 47 684 steps = 800 B tokens.
Hardware: weights and moments as kept here take 31 GB, the step's bfloat16 copies 15 GB and, with more than one
micro-batch, the sum of gradients 15 GB more. Measured on one H100 80GB with micro-batches: 65.4 GB and 2737 tokens/s;
with --compute.remat dots_except_gate_up 74.6 GB and 2962 tokens/s. On 8 GPUs with --parallel.fsdp 8
--train.micro_batches 512 --compute.remat dots the compiler needs 39.5 GB a GPU, for 256 micro-batches 58 GB.
Expected result: not known; nobody has trained it. Rate, warmup and clipping are those of the public dense run.
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
        run_dir="runs/moe_3_8b",
        model=ModelConfig(width=5280, heads=55, kv_heads=55, mlp_width=17920),
        compute=ComputeConfig(unroll=True),
        moe=MoEConfig(experts=8, active=2, width=1792),
        recurrence=RecurrenceConfig(mean=32, backprop_depth=8),
        train=TrainConfig(steps=47_684, batch_size=4096, sequence_length=4096, micro_batches=4096),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=4096, moment_dtype="bfloat16"),
        data=DataConfig(source="hub", path="tomg-group-umd/huginn-dataset"),
    )
