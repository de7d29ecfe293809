"""The sections that say what the model is: `model`, `moe` and `recurrence`."""

from dataclasses import dataclass
from typing import Literal

from jax_huginn.config.checks import require, require_positive

LONGEST_CONTEXT = 2**24  # tokens; a table of angles is made for as many


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
    """Longest sequence in tokens (the exported `block_size`)."""
    norm_eps: float = 1e-6
    """Epsilon inside every RMSNorm."""
    rope_base: float = 50_000.0
    """Base of the rotary embedding's wavelengths."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Arithmetic of activations and matmuls; norms, RoPE, router and loss use at least float32."""
    param_dtype: Literal["float32", "float64"] = "float32"
    """Type in which weights are kept and updated (master weights)."""

    @property
    def head_dim(self) -> int:
        """Width of one head (K)."""
        return self.width // self.heads

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "vocab_size", "width", "heads", "kv_heads", "mlp_width", "core_layers", "max_length",
            "norm_eps", "rope_base",
        )  # fmt: skip
        require(
            self.max_length <= LONGEST_CONTEXT, f"model.max_length={self.max_length} is more than {LONGEST_CONTEXT}"
        )
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
            f"model.width={self.width} over model.heads={self.heads} gives heads of {self.head_dim}; RoPE rotates "
            "pairs, so the head width must be even",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"model.heads={self.heads} must be divisible by model.kv_heads={self.kv_heads}",
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
    """Weight of the load-balance loss, which is 1 if every router is balanced over the step's micro-batches so far."""
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
    """Number of recurrences in training (arXiv 2502.05171, section 3.3)."""

    mean: int = 32
    """Mean number of recurrences (r). The public scheme draws max(mean, backprop_depth) + 1 on average."""
    backprop_depth: int = 8
    """Last recurrences, through which gradients flow (k_max)."""
    scheme: Literal["poisson-lognormal-filling", "fixed"] = "poisson-lognormal-filling"
    """Distribution of the sampled depth. fixed: always `mean` recurrences."""
    lockstep: bool = False
    """Draw one depth for all micro-batches of a step, as the public run did, rather than one for each."""
    curriculum: int = 0
    """Draws over which depth and backpropagation depth ramp up linearly; 0 starts at full depth."""

    @property
    def gradient_steps(self) -> int:
        """The usual number of recurrences with gradient (k): that of every draw of at least `backprop_depth`."""
        return min(self.mean, self.backprop_depth)

    def __post_init__(self) -> None:
        require_positive("recurrence", self, "mean", "backprop_depth")
        require(self.curriculum >= 0, f"recurrence.curriculum={self.curriculum} must not be negative")
