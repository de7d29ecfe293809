"""Real text on one GPU: 41 M tokens of Linux's sources and documentation, for the comparisons of docs/experiments.md.

    python benchmarks/token_rows.py linux-source-6.1 --folders Documentation block crypto fs include init io_uring ipc \
        kernel lib mm net security virt --suffixes .c .h .S .rst .txt --out runs/corpus
    python train_jax.py --config configs/linux.py

The folder is what Debian's package linux-source-6.1 contains (6.1.170-3). Dense; `benchmarks/real_text.py` trains the
variants with experts.
Hardware: one GPU; 224 s at 183,000 tokens/s with three such runs at once on an H100 80GB, without compilation.
Expected result: held-out bits per byte 1.190, 1.036 and 1.035 at 1, 4 and 32 recurrences.
"""

from jax_huginn.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RecurrenceConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/linux",
        model=ModelConfig(
            vocab_size=8192,
            width=384,
            heads=6,
            kv_heads=6,
            mlp_width=1152,
            prelude_layers=1,
            core_layers=2,
            coda_layers=1,
            max_length=512,
        ),
        compute=ComputeConfig(remat="none", unroll=True, loss_chunk=8192),
        moe=MoEConfig(experts=0, active=2, width=384),
        recurrence=RecurrenceConfig(mean=8, backprop_depth=4),
        train=TrainConfig(steps=2500, batch_size=32, sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, cooldown_steps=1000),
        data=DataConfig(
            source="parquet",
            path="runs/corpus/train",
            validation_path="runs/corpus/held_out.parquet",
            tokenizer="runs/corpus/tokenizer",
        ),
        validation=ValidationConfig(every=500, sequences=128, depths=(1, 2, 4, 8, 16, 32)),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=50, tensorboard=False),
    )
