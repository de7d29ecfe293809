"""What depth is for: a shell game in text. Games longer than any seen in training are solved by thinking longer.

    python train_jax.py --config configs/shell_game.py

With experts: --moe.experts 4. Hardware: any; 1000 steps of 2048 tokens take 6 min 35 s of CPU time, compilation and the
validations at 500 and 1000 steps included (2 cores of an AMD EPYC, Python 3.11, jax 0.10.2).
Expected result: trained on games of 1 to 12 swaps, games of 12 are right at 0.22, 0.88 and 0.99 with 4, 8 and 32
recurrences, games of 24 at 0.21, 0.26 and 0.99; chance is 0.20.
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
        run_dir="runs/shell_game",
        model=ModelConfig(
            vocab_size=17,
            width=64,
            heads=4,
            kv_heads=4,
            mlp_width=192,
            prelude_layers=1,
            core_layers=1,
            coda_layers=1,
            max_length=64,
            dtype="float32",
        ),
        compute=ComputeConfig(remat="none"),
        moe=MoEConfig(experts=0, active=2, width=64),
        recurrence=RecurrenceConfig(mean=8, backprop_depth=4),
        train=TrainConfig(steps=1000, batch_size=32, sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, cooldown_steps=333),
        # 16,000 rows are 500 steps.
        data=DataConfig(source="generated", difficulty=12, test_difficulty=32, curriculum_rows=16_000),
        validation=ValidationConfig(every=500, sequences=1024, depths=(1, 2, 4, 8, 12, 16, 24, 32)),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=50),
    )
