"""The model's shape in the words of a `.pth` file's `model_config`, the public training-checkpoint layout.

The reference keeps its own small config, because it may not import the JAX package; a parity test compares
the two. Only what shapes the model is a field; what this model cannot represent is refused by name.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Placement = Literal["injection", "core"]
LONGEST_CONTEXT = 2**24  # tokens; a table of angles is made for as many

# Choices that the public layout can express and this model makes only one way. Absent means the default.
_FIXED: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "init_strategy": "takase",
    "tie_embeddings": True,
    "qk_bias": True,
    "bias": False,
}
_ONLY_READ: dict[str, Any] = {
    "state_init": "like-init",
    "tie_word_embeddings": True,
    "lm_head_bias": False,
    "qk_norm": False,
    "clip_qkv": None,
    "use_abacus": False,
    "randomize_positions_from": None,
    "debias_attention": False,
    "center_attention": False,
    "embed_step": False,
    "normalize_rec": "",
    "intermediate_noise_injection": 0,
    "test_time_noise": 0,
    "mup_model_scaling_factor": 1,
}
_FIXED_ROPE: dict[str, Any] = {"use_rope": True, "rope_condense_ratio": 1}
_MOE_FIELDS = ("num_experts", "moe_k", "moe_intermediate_size", "moe_placement", "moe_residual")


@dataclass(frozen=True)
class MoEHuginnConfig:
    """Shape of one model. `num_experts` 0 is a dense model, for which the other `moe_*` fields mean nothing.

    Raises ValueError, one line naming field and value, when the shape cannot be built.
    """

    n_embd: int
    """Width of the residual stream and of the latent state (D)."""
    num_attention_heads: int
    """Query heads (H)."""
    num_key_value_heads: int
    """Key and value heads (G), a divisor of H."""
    intermediate_size: int
    """Hidden width of the gated MLP (F)."""
    padded_vocab_size: int
    """Rows of the tied embedding (V)."""
    block_size: int
    """Longest sequence, in tokens."""
    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int
    mean_recurrence: int
    """Recurrences when `num_steps` is not given; also scales the output projections at init."""
    mean_backprop_depth: int
    """How many of them, the last ones, carry gradients."""
    norm_eps: float = 1e-6
    rope_base: float = 50_000.0
    num_experts: int = 0
    """Routed experts (E)."""
    moe_k: int = 2
    """Routed experts that a token visits (A)."""
    moe_intermediate_size: int = 0
    """Hidden width of every expert (M)."""
    moe_placement: Placement = "injection"
    moe_residual: bool = False
    balance_weight: float = 0.01
    z_weight: float = 0.0
    sampling_scheme: str = "poisson-lognormal-filling"
    """Law of the depth in training; kept for the file, of no effect here."""
    name: str = "moe-huginn"
    """Name of the shape; the public script builds its model from this alone."""

    @property
    def head_dim(self) -> int:
        """Width of one head (K)."""
        return self.n_embd // self.num_attention_heads

    @property
    def effective_depth(self) -> int:
        """Blocks that a token passes at the mean recurrence (L); 132 for the 3.5B shape."""
        core = self.n_layers_in_recurrent_block * self.mean_recurrence
        return self.n_layers_in_prelude + core + self.n_layers_in_coda

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            kind = int if default is dataclasses.MISSING else type(default)
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            _require(type(value) is kind, field.name, value, f"must be of type {kind.__name__}")
            _require(kind is not float or math.isfinite(value), field.name, value, "must be a finite number")
        positive = ["n_embd", "num_attention_heads", "num_key_value_heads", "intermediate_size", "padded_vocab_size",
                    "block_size", "n_layers_in_recurrent_block", "mean_recurrence", "mean_backprop_depth",
                    "norm_eps", "rope_base"]  # fmt: skip
        positive += ["moe_k", "moe_intermediate_size"] if self.num_experts > 0 else []
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("n_layers_in_prelude", "n_layers_in_coda", "num_experts", "balance_weight", "z_weight"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")

        _require(self.block_size <= LONGEST_CONTEXT, "block_size", self.block_size, f"is more than {LONGEST_CONTEXT}")
        D, H, G, E = (self.n_embd, self.num_attention_heads, self.num_key_value_heads, self.num_experts)
        _require(D % H == 0, "n_embd", D, f"must be divisible by num_attention_heads={H}")
        _require(D // H % 2 == 0, "n_embd", D, f"over num_attention_heads={H} must give heads of even width")
        _require(H % G == 0, "num_key_value_heads", G, f"must divide num_attention_heads={H}")
        if E > 0:
            _require(self.moe_k <= E, "moe_k", self.moe_k, f"is more than num_experts={E}")
            placements = get_args(Placement)
            _require(self.moe_placement in placements, "moe_placement", self.moe_placement, f"is none of {placements}")
            in_core = self.moe_placement == "core"
            _require(not (in_core and self.moe_residual), "moe_residual", True, "needs moe_placement='injection'")

    @classmethod
    def from_model_config(cls, values: dict[str, Any]) -> "MoEHuginnConfig":
        """The shape described by a file's `model_config`; fields that do not shape the model are ignored.

        Raises ValueError, one line naming field and value, for what this model cannot represent or a missing field.
        """
        _require(isinstance(values, dict), "", values, "must be a dict")
        rope = values.get("rope_settings") or {}
        _require(isinstance(rope, dict), "rope_settings", rope, "must be a dict")
        for given, fixed, prefix in ((values, {**_FIXED, **_ONLY_READ}, ""), (rope, _FIXED_ROPE, "rope_settings.")):
            for name, only in fixed.items():
                value = given.get(name, only)
                _require(value == only, prefix + name, value, f"cannot be represented here, only {only!r}")

        given = {f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None}
        if "rope_base" in rope:
            given["rope_base"] = rope["rope_base"]
        if "num_attention_heads" in given:  # the public config leaves the key heads out when they are not grouped
            given.setdefault("num_key_value_heads", given["num_attention_heads"])
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise ValueError(f"model_config.{field.name} is missing")
        return cls(**given)

    def to_model_config(self) -> dict[str, Any]:
        """The complete plain dict of the layout; `from_model_config` is its inverse."""
        values = dataclasses.asdict(self)
        moe = {name: values.pop(name) for name in (*_MOE_FIELDS, "balance_weight", "z_weight")}
        rope = {**_FIXED_ROPE, "rope_base": values.pop("rope_base")}
        return {
            **values,
            **_FIXED,
            "vocab_size": self.padded_vocab_size,
            "rope_settings": rope,
            **(moe if self.num_experts > 0 else {}),
        }


def model_config_of(described: Any) -> dict[str, Any]:
    """A Hugging Face folder's config.json in the words of `model_config`.

    Raises ValueError for another kind of model.
    """
    values: dict[str, Any] = described if isinstance(described, dict) else {}
    kind = values.get("model_type")
    if kind not in ("huginn_raven", "moe_huginn"):
        raise ValueError(f"model_type={kind!r} is neither 'huginn_raven' nor 'moe_huginn'")
    renamed = {"n_heads": "num_attention_heads", "vocab_size": "padded_vocab_size"} if kind == "huginn_raven" else {}
    return {renamed.get(name, name): value for name, value in values.items()}


def MoEHuginnConfig700M(**fields: Any) -> MoEHuginnConfig:
    """About 0.71 B parameters: 8 routed experts and a shared one, top 2. `fields` replace those of the shape."""
    shape: dict[str, Any] = {
        "name": "moe-huginn-700m",
        "n_embd": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "padded_vocab_size": 65536,
        "block_size": 4096,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 4,
        "n_layers_in_coda": 2,
        "mean_recurrence": 32,
        "mean_backprop_depth": 8,
        "num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 2816,
    }
    return MoEHuginnConfig(**(shape | fields))


def _require(holds: bool, name: str, value: Any, problem: str) -> None:
    if not holds:
        field = f"model_config.{name}" if name else "model_config"
        raise ValueError(f"{field}={value!r} {problem}")
