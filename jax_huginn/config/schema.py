"""Every knob of a run, as frozen dataclasses that check themselves when they are built.

A preset is a Python file in `configs/` whose `get_config()` returns a `Config`; the command line
overrides single fields (`--train.steps 10`). A value that cannot work raises `ConfigError`, which names
the field and the value, before anything is compiled. The text under a field is what `--help` prints.
"""

from dataclasses import dataclass, field
from typing import Literal

from jax_huginn.config.checks import require, require_positive
from jax_huginn.config.durations import seconds_of
from jax_huginn.config.parallel import ParallelConfig
from jax_huginn.config.profile import ProfileConfig


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the dense part (arXiv 2502.05171, section 3 and table 1)."""

    vocab_size: int = 65536
    """Rows of the tied embedding (V). A tokenizer may define fewer tokens, never more."""
    width: int = 5280
    """Width of the residual stream and of the latent state (D)."""
    heads: int = 55
    """Query heads (H); a head is width / heads wide."""
    kv_heads: int = 55
    """Key and value heads (G), a divisor of `heads`; fewer than `heads` is grouped-query attention."""
    mlp_width: int = 17920
    """Hidden width of the gated MLP (F)."""
    prelude_layers: int = 2
    """Sandwich blocks that embed the tokens (P)."""
    core_layers: int = 4
    """Sandwich blocks inside one recurrence (C)."""
    coda_layers: int = 2
    """Sandwich blocks that read the answer out (T)."""
    max_length: int = 4096
    """Longest sequence in tokens that the model is made for (the exported `block_size`)."""
    norm_eps: float = 1e-6
    """Epsilon inside every RMSNorm."""
    rope_base: float = 50_000.0
    """Base of the rotary embedding's wavelengths."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Arithmetic of activations and matmuls; norms, RoPE, router and loss use at least float32."""
    param_dtype: Literal["float32", "float64"] = "float32"
    """Type in which weights are kept and updated (master weights)."""
    attention: Literal["auto", "xla", "cudnn", "einsum"] = "auto"
    """Attention kernel. auto: cudnn for 16-bit types on NVIDIA, einsum on CPUs and for float64, xla elsewhere."""
    remat: Literal["none", "dots", "dots_except_gate_up", "attention", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matmuls and attention, all but these without an MLP's first
    matmul, all but attention, everything."""
    unroll: bool = False
    """Write out the recurrences with gradient, unless remat is full: faster, since nothing is copied into stacked
    buffers, and longer to compile."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at once on a device in training; the (B,S,V) logits never do."""

    @property
    def head_dim(self) -> int:
        """Width of one head (K)."""
        return self.width // self.heads

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "vocab_size", "width", "heads", "kv_heads", "mlp_width", "core_layers", "max_length",
            "norm_eps", "rope_base", "loss_chunk",
        )  # fmt: skip
        require(self.prelude_layers >= 0, f"model.prelude_layers={self.prelude_layers} must not be negative")
        require(self.coda_layers >= 0, f"model.coda_layers={self.coda_layers} must not be negative")
        layers = self.prelude_layers + self.core_layers + self.coda_layers
        require(layers <= 256, f"model.prelude_layers + core_layers + coda_layers = {layers} is more than 256")
        require(
            self.width % self.heads == 0,
            f"model.width={self.width} must be divisible by model.heads={self.heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.width={self.width} over model.heads={self.heads} gives heads of {self.head_dim}; RoPE turns "
            "pairs, so the head width must be even",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"model.heads={self.heads} must be divisible by model.kv_heads={self.kv_heads}",
        )
        require(
            self.dtype != "float64" or self.attention in ("auto", "einsum"),
            f"model.attention={self.attention} computes its softmax in float32; with model.dtype=float64 use einsum",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Shared-expert Mixture of Experts: one expert sees every token, `active` of `experts` routed ones see theirs."""

    experts: int = 8
    """Routed experts (E); 0 makes a dense model."""
    active: int = 2
    """Routed experts that a token visits (A, top-k)."""
    width: int = 1792
    """Hidden width of each expert, the shared one included (M)."""
    placement: Literal["injection", "core"] = "injection"
    """injection: once, on the embedding that every recurrence receives. core: in place of each core block's MLP."""
    residual: bool = False
    """Add the MoE's output to its input before its norm (placement injection); used to upcycle a dense model."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss, which is 1 when balanced."""
    z_weight: float = 0.0
    """Weight of the router z-loss, the mean squared logsumexp of the router's logits."""

    def __post_init__(self) -> None:
        require(self.experts >= 0, f"moe.experts={self.experts} must not be negative; 0 makes a dense model")
        if self.experts == 0:
            return
        require_positive("moe", self, "active", "width")
        require(
            self.active <= self.experts,
            f"moe.active={self.active} is more than moe.experts={self.experts}",
        )
        require(
            not (self.residual and self.placement == "core"),
            "moe.residual=true belongs to moe.placement=injection: a core block adds its own residual",
        )
        for name in ("balance_weight", "z_weight"):
            value = getattr(self, name)
            require(value >= 0, f"moe.{name}={value} must not be negative")


@dataclass(frozen=True)
class RecurrenceConfig:
    """How deep training thinks (arXiv 2502.05171, section 3.3)."""

    mean: int = 32
    """Mean number of recurrences (r)."""
    backprop_depth: int = 8
    """Recurrences at the end through which gradients flow (k_max)."""
    scheme: Literal["poisson-lognormal-filling", "fixed"] = "poisson-lognormal-filling"
    """Law of the sampled depth. fixed: always `mean` recurrences."""
    curriculum: int = 0
    """Micro-batches over which depth and backpropagation depth ramp up linearly; 0 starts at full depth."""

    def __post_init__(self) -> None:
        require_positive("recurrence", self, "mean", "backprop_depth")
        require(self.curriculum >= 0, f"recurrence.curriculum={self.curriculum} must not be negative")


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
    """Parts of the batch that are computed one after the other, each with a sampled depth of its own."""
    seed: int = 0
    """Seed of the weights, the depths, the initial states and the order of the data."""
    deterministic: bool = False
    """Bit-reproducible kernels on a GPU: XLA's, and its attention in place of cuDNN's, which takes (B,H,S,S) scores of
    memory. A CPU's results always are reproducible."""
    max_skipped: int = 10
    """Updates skipped in a row, for a loss or a gradient that is not finite, at which the run stops."""

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
    """adam_atan2: as the public run used it. muon: on the hidden matrices, at AdamW's rate; the rest is on AdamW."""
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
    """Share of itself that a matrix loses in a step, norms and biases never: times the learning rate in adamw and muon
    (None: 0.1), times the learning rate over its peak in adam_atan2 (None: 1e-4, the public run's)."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which moments are kept between steps; bfloat16 saves 4 bytes a parameter, of muon's matrices 2."""
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

    source: Literal["stdlib", "text", "parquet", "hub"] = "parquet"
    """stdlib: the sources of this Python's standard library. text: .txt, .jsonl and .py files. parquet: token rows.
    hub: token rows of a Hugging Face dataset, fetched while training runs."""
    path: str = ""
    """Folder (searched recursively) or file of the source; OWNER/NAME or OWNER/NAME/FOLDER of hub; unused by stdlib."""
    validation_path: str = ""
    """Folder or file of held-out data; for hub a folder of the repository. Empty: the hub repository's own validation
    split, or else every file whose name hashes to the validation share."""
    validation_fraction: float = 0.05
    """Share of files held out for validation, chosen by a hash of the relative path."""
    tokenizer: str = ""
    """Hugging Face tokenizer folder or name. Empty: a byte-level BPE trained on the training files (text sources)."""
    streams: int = 8
    """Virtual streams that define the order of the data; stream i reads files i, i + streams, ..."""
    shuffle_window: int = 256
    """Rows within which each stream is shuffled; 1 keeps the files' order."""
    prefetch: int = 4
    """Batches prepared ahead of the device."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What becomes of a row (wrong length, null, token outside the vocabulary) or a parquet file (damaged, empty, other
    columns) that cannot be used: it is skipped, counted and logged, or it ends the run."""
    revision: str = "main"
    """Branch, tag or commit of the hub's dataset; a run keeps the commit that it found at its start."""
    cache_dir: str = ""
    """Folder of the files fetched from the hub, which runs may share. Empty: in the Hugging Face home."""
    cache_gb: float = 64.0
    """Size that each process's part of that folder may reach, in GB of 10^9 bytes."""

    def __post_init__(self) -> None:
        require_positive("data", self, "streams", "shuffle_window", "prefetch", "cache_gb")
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
    """Held-out sequences, computed a micro-batch at a time; rounded to whole micro-batches, at least one."""
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
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good, beside the newest; 0: none."""
    resume: bool = True
    """Go on from the newest checkpoint of the run folder."""
    overwrite: bool = False
    """With resume false: delete the run folder's earlier results."""
    init_from: str = ""
    """Start from the weights of a run or step folder, a .pth or a Hugging Face folder: fresh optimiser, step 0. Only a
    start: once the run folder has a checkpoint of its own, the run goes on from that."""
    save_before_timeout: str = ""
    """Save and stop this long before the job's end: 5m, 300 (seconds) or 1h30m. SLURM tells the end (its variable
    SLURM_JOB_END_TIME); elsewhere give time_limit."""
    time_limit: str = ""
    """Length of the job, counted from the start of the command, for example 24h; of two ends the earlier one counts."""

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


@dataclass(frozen=True)
class Config:
    """A whole run: `MoEHuginnModel(config)` reads `model`, `moe` and `recurrence`, training reads the rest."""

    run_dir: str = "runs/default"
    """Folder of this run: config.json, metrics.jsonl, checkpoints, tokenizer, TensorBoard events."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(
            self.train.sequence_length <= self.model.max_length,
            f"train.sequence_length={self.train.sequence_length} is more than model.max_length={self.model.max_length}",
        )
        require(
            not (self.train.deterministic and self.model.attention == "cudnn"),
            "train.deterministic=true needs another kernel than model.attention=cudnn: use auto or xla",
        )
