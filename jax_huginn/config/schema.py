"""`Config`: every option of a run, as frozen dataclasses that check themselves when they are built.

A preset is a Python file in `configs/` whose `get_config()` returns a `Config`; the command line overrides single
fields (`--train.steps 10`). A value that cannot work raises `ConfigError`, which names the field and the value, before
anything is compiled. The text under a field is what `--help` prints.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from jax_huginn.config.checks import require
from jax_huginn.config.execution import ComputeConfig, ParallelConfig, ProfileConfig
from jax_huginn.config.model import ModelConfig, MoEConfig, RecurrenceConfig
from jax_huginn.config.run import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RecurrenceConfig",
    "TrainConfig",
    "ValidationConfig",
]


@dataclass(frozen=True)
class Config:
    """A whole run. `MoEHuginnModel(config)` reads model, moe, recurrence and compute; training reads the rest."""

    run_dir: str = "runs/default"
    """Folder of this run: config.json, metrics.jsonl, checkpoints, tokenizer, TensorBoard events."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir.strip()), f"run_dir={self.run_dir!r} names no folder: give --run_dir a path")
        for section in dataclasses.fields(self):
            options = getattr(self, section.name)
            for option in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
                value = getattr(options, option.name)
                require(
                    not isinstance(value, float) or math.isfinite(value),
                    f"{section.name}.{option.name}={value} must be a finite number",
                )
        require(
            self.train.sequence_length <= self.model.max_length,
            f"train.sequence_length={self.train.sequence_length} is more than model.max_length={self.model.max_length}",
        )
        require(
            self.model.dtype != "float64" or self.compute.attention in ("auto", "einsum"),
            f"compute.attention={self.compute.attention} computes its softmax in float32; with model.dtype=float64 use "
            "einsum",
        )
        first, last = self.profile.range.start, self.profile.range.stop - 1
        require(
            last < first or first <= self.train.steps,
            f"profile.steps={self.profile.steps} begins after the last step, train.steps={self.train.steps}",
        )
