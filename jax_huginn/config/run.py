"""The sections that say what a run does: `train`, `optimizer`, `data`, `validation`, `checkpoint` and `log`."""

from dataclasses import dataclass
from typing import Literal

from jax_huginn.config.checks import require, require_positive, seconds_of


@dataclass(frozen=True)
class TrainConfig:
    """One run's length, batch and seed."""

    steps: int = 47_684
    """Optimiser steps."""
    batch_size: int = 4096
    """Sequences per step, over all devices and micro-batches."""
    sequence_length: int = 4096
    """Tokens per sequence."""
    micro_batches: int = 1
    """Parts of the batch computed one after another, each with its own sampled depth."""
    seed: int = 0
    """Seed of the weights, the depths, the initial states and the order of the data."""
    max_skipped: int = 10
    """Consecutive updates skipped because of a loss or gradient that is not finite, at which the run stops."""

    def __post_init__(self) -> None:
        require_positive("train", self, "steps", "batch_size", "sequence_length", "micro_batches", "max_skipped")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2**32)")
        require(
            self.batch_size % self.micro_batches == 0,
            f"train.batch_size={self.batch_size} must be divisible by train.micro_batches={self.micro_batches}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and schedule (arXiv 2502.05171, section 4.3: constant rate after warmup, clip at 1)."""

    name: Literal["adamw", "adam_atan2", "muon"] = "adamw"
    """adam_atan2: the public run's. muon: for the hidden matrices, at AdamW's rate; AdamW for the rest."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    """trapezoid: warmup, constant, linear cooldown. cosine: warmup, then a half cosine."""
    warmup_steps: int = 4096
    """Steps of linear warmup from 0; a run shorter than its warmup and cooldown cuts them off."""
    cooldown_steps: int = 0
    """Steps of linear cooldown at the end (trapezoid)."""
    final_fraction: float = 0.0
    """Learning rate at the end as a fraction of the peak (cooldown or cosine)."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment; adam_atan2 has a floor of 1e-6 under that root instead."""
    weight_decay: float | None = None
    """Weight decay; never applied to norms and biases. adamw, muon: multiplied by the learning rate (default 0.1).
    adam_atan2: multiplied by the learning rate over its peak (default 1e-4, as in the public run)."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which moments are stored between steps; bfloat16 saves 4 bytes a parameter (2 for muon's matrices)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""

    @property
    def decay(self) -> float:
        """`weight_decay`, or the optimiser's own."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 1e-4 if self.name == "adam_atan2" else 0.1

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "learning_rate", "eps", "clip_norm")
        require(
            self.moment_dtype == "float32" or self.b2 < 0.997,
            f"optimizer.moment_dtype={self.moment_dtype} cannot hold the second moment at optimizer.b2={self.b2}: its "
            "decay of a step is below bfloat16's rounding, so that it never falls; use float32, or b2 of 0.995 or less",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)")
        for name in ("warmup_steps", "cooldown_steps", "final_fraction"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}={value} must not be negative")
        require(self.decay >= 0, f"optimizer.weight_decay={self.decay} must not be negative")
        require(
            self.name != "adam_atan2" or self.decay <= 0.01,
            f"optimizer.weight_decay={self.decay} under optimizer.name=adam_atan2 is the share of every matrix lost in "
            "each step at the peak learning rate; the public run's is 1e-4, adamw's 0.1 at a rate of 5e-4 is 5e-5",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    source: Literal["stdlib", "text", "parquet", "hub", "generated"] = "parquet"
    """stdlib: the sources of this Python's standard library. text: .txt, .jsonl and .py files. parquet: token rows.
    hub: token rows of a Hugging Face dataset, fetched while training runs. generated: rows of `task`, made as they are
    needed."""
    path: str = ""
    """Folder (searched recursively) or file of the source; OWNER/NAME or OWNER/NAME/FOLDER of hub; unused by stdlib
    and generated."""
    validation_path: str = ""
    """Folder or file of held-out data; for hub a folder of the repository. Empty: the hub repository's own validation
    split, or else every file whose name hashes to the validation share."""
    validation_fraction: float = 0.05
    """Share of files held out for validation, chosen by a hash of the relative path."""
    tokenizer: str = ""
    """Hugging Face tokenizer folder, or the name of a model on the hub, whose tokenizer is fetched. Empty: a byte-level
    BPE trained on the training files (text sources)."""
    streams: int = 8
    """Virtual streams that define the order of the data; each reads an equal share of every epoch."""
    shuffle_window: int = 256
    """Rows within which each stream is shuffled; 1 keeps the files' order."""
    task: Literal["shell_game", "products", "last_digit", "most_frequent"] = "shell_game"
    """What generated rows hold; answers alone are learnt. shell_game: lines such as 2CAFJB=4, a ball's cup, swaps of
    two of five cups, and the ball's cup at the end. products: cbfd, elements of the group S3, at each the product so
    far. last_digit: 3514=3, digits and the last one of their sum. most_frequent: BADBE=B, letters and the most frequent
    one. The difficulty is the number of swaps, factors, digits or letters."""
    difficulty: int = 12
    """Hardest generated example of training; difficulties are uniform up to it."""
    curriculum_rows: int = 0
    """Rows over which the hardest generated example grows from difficulty 2 to `difficulty`; 0: no growth."""
    test_difficulty: int = 32
    """Hardest generated example of validation."""
    prefetch: int = 4
    """Batches prepared ahead of the device."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What to do with an unusable row (wrong length, null, token outside the vocabulary) or file (damaged, empty, other
    columns). skip: count it, log it and continue. stop: end the run."""
    revision: str = "main"
    """Branch, tag or commit of the hub dataset; a run keeps the commit found at its start."""
    cache_dir: str = ""
    """Folder for files fetched from the hub; runs may share it. Empty: inside the Hugging Face home."""
    cache_gb: float = 64.0
    """Largest size of each process's part of that folder, in GB of 10^9 bytes."""

    @property
    def masks_labels(self) -> bool:
        """Whether rows choose which of their tokens are learnt, so that micro-batches differ in how many they have."""
        return self.source == "generated"

    def __post_init__(self) -> None:
        require_positive("data", self, "streams", "shuffle_window", "prefetch", "cache_gb")
        require_positive("data", self, "difficulty", "test_difficulty")
        require(self.curriculum_rows >= 0, f"data.curriculum_rows={self.curriculum_rows} must not be negative")
        require(
            self.source != "generated" or not self.tokenizer,
            f"data.tokenizer={self.tokenizer!r} cannot be used: data.source=generated has a tokenizer of its own",
        )
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie in [0, 1)",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss at several depths of thought."""

    every: int = 500
    """Steps between validations; 0 validates at the last step only."""
    sequences: int = 128
    """Held-out sequences, rounded up to whole micro-batches."""
    depths: tuple[int, ...] = (1, 4, 8, 16, 32)
    """Recurrences at which the held-out loss is measured."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"validation.every={self.every} must not be negative")
        require_positive("validation", self, "sequences")
        require(
            len(self.depths) > 0 and min(self.depths) > 0,
            f"validation.depths={self.depths} must be one or more positive recurrences",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in RUN/checkpoints/<step>/."""

    every: int = 1000
    """Steps between checkpoints; one is always written at the last step."""
    keep: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never deleted; 0: none."""
    resume: bool = True
    """Resume from the newest checkpoint of the run folder."""
    accept_changes: bool = False
    """Resume although rate, schedule, decay, clipping, batch size, depths or loss weights differ from the run's so far;
    the optimiser's state is kept and what changed is printed."""
    overwrite: bool = False
    """With resume false: delete the run folder's earlier results."""
    init_from: str = ""
    """Start from the weights of a run or step folder, a .pth or a Hugging Face folder: fresh optimiser, step 0. Used at
    the start only: once the run folder has a checkpoint of its own, the run resumes from that."""
    save_before_timeout: str = ""
    """Save and stop this long before the end of the job: 5m, 300 (seconds) or 1h30m. SLURM sets the end in
    SLURM_JOB_END_TIME; elsewhere give time_limit."""
    time_limit: str = ""
    """Length of the job from the start of the command, for example 24h. An earlier end set by SLURM counts instead."""

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, "every", "keep")
        require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every} must not be negative")
        for name in ("save_before_timeout", "time_limit"):
            text = getattr(self, name)
            require(
                not text or seconds_of(text) is not None,
                f"checkpoint.{name}={text} is not a length of time: write 300, 300s, 5m or 1h30m",
            )
        require(
            not self.time_limit or bool(self.save_before_timeout),
            f"checkpoint.time_limit={self.time_limit} needs checkpoint.save_before_timeout, for example 5m",
        )


@dataclass(frozen=True)
class LogConfig:
    """Console, RUN/metrics.jsonl, TensorBoard and Weights & Biases."""

    every: int = 10
    """Steps between full records (routing, recurrence, speed); the loss is written for every step."""
    tensorboard: bool = True
    """Write TensorBoard events into RUN/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases (extra `wandb`; WANDB_MODE=offline works)."""
    wandb_project: str = "moe-huginn"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        require_positive("log", self, "every")
