"""A model in words: our `Config`, the `.pth` layout's `model_config` and Hugging Face's `config.json`.

What another layout can say and this model cannot be is refused, naming the field; nothing is guessed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import Config, ModelConfig, MoEConfig, RecurrenceConfig, TrainConfig
from jax_huginn.interop.errors import WeightsError

Dtype = Literal["bfloat16", "float32", "float64"]
PUBLIC_TYPE = "huginn_raven"
"""`model_type` of huginn-0125 and of every dense model without grouped heads."""
OWN_TYPE = "moe_huginn"
"""`model_type` of the others; the rest of their config.json are the fields of the `.pth` layout's `model_config`."""
_CLASSES = {PUBLIC_TYPE: "Raven", OWN_TYPE: "Huginn"}

# Choices that the public layout can express and this model makes one way only. Absent means that way.
_WRITTEN: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT",
    "injection_type": "linear",
    "tie_embeddings": True,
    "qk_bias": True,
    "bias": False,
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "init_strategy": "takase",
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
_ROPE: dict[str, Any] = {"use_rope": True, "rope_condense_ratio": 1}

# (our section, our field, the name in model_config, whether a file must have it)
_FIELDS = (
    ("model", "width", "n_embd", True),
    ("model", "heads", "num_attention_heads", True),
    ("model", "kv_heads", "num_key_value_heads", False),
    ("model", "mlp_width", "intermediate_size", True),
    ("model", "vocab_size", "padded_vocab_size", True),
    ("model", "max_length", "block_size", True),
    ("model", "norm_eps", "norm_eps", False),
    ("model", "rope_base", "rope_base", False),
    ("model", "prelude_layers", "n_layers_in_prelude", True),
    ("model", "core_layers", "n_layers_in_recurrent_block", True),
    ("model", "coda_layers", "n_layers_in_coda", True),
    ("recurrence", "mean", "mean_recurrence", True),
    ("recurrence", "backprop_depth", "mean_backprop_depth", True),
    ("recurrence", "scheme", "sampling_scheme", False),
    ("moe", "experts", "num_experts", False),
    ("moe", "active", "moe_k", False),
    ("moe", "width", "moe_intermediate_size", False),
    ("moe", "placement", "moe_placement", False),
    ("moe", "residual", "moe_residual", False),
    ("moe", "balance_weight", "balance_weight", False),
    ("moe", "z_weight", "z_weight", False),
)
_SECTIONS = {"model": ModelConfig, "moe": MoEConfig, "recurrence": RecurrenceConfig}


def model_config(config: Config) -> dict[str, Any]:
    """The `model_config` of the `.pth` layout: plain types only."""
    described: dict[str, Any] = {
        "name": "nebel-raven-3.5b" if _is_public_shape(config) else Path(config.run_dir).name,
        "vocab_size": config.model.vocab_size,
        "rope_settings": {**_ROPE, "rope_base": config.model.rope_base},
        **_WRITTEN,
    }
    for section, field, name, _ in _FIELDS:
        if name != "rope_base" and (section != "moe" or config.moe.experts):
            described[name] = getattr(getattr(config, section), field)
    return described


def huggingface_config(config: Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder whose tensors are of type `dtype`.

    A dense model gets the public configuration's own arguments and no others; grouped heads and a MoE, which it has no
    words for, make a folder of our own type.
    """
    model, recurrence = config.model, config.recurrence
    if config.moe.experts or model.kv_heads != model.heads:
        return {**_named(OWN_TYPE), **model_config(config), "torch_dtype": dtype, "dtype": dtype}
    return {
        **_named(PUBLIC_TYPE),
        "n_embd": model.width,
        "n_heads": model.heads,
        "n_layers": model.prelude_layers + model.core_layers + model.coda_layers,
        "block_size": model.max_length,
        "vocab_size": model.vocab_size,
        "padding_multiple": math.gcd(model.vocab_size, 4096),
        "intermediate_size": model.mlp_width,
        "norm_eps": model.norm_eps,
        **_WRITTEN,
        "init_orthogonal": False,
        "state_init": _ONLY_READ["state_init"],
        "n_layers_in_prelude": model.prelude_layers,
        "n_layers_in_recurrent_block": model.core_layers,
        "n_layers_in_coda": model.coda_layers,
        "mean_recurrence": recurrence.mean,
        "mean_backprop_depth": recurrence.backprop_depth,
        "sampling_scheme": recurrence.scheme,
        "activation_checkpoint_impl": "per-iteration",
        "rope_base": model.rope_base,
        "torch_dtype": dtype,  # the name that Transformers 4 reads
        "dtype": dtype,  # the one that Transformers 5 reads, which takes bfloat16 for float32 without it
    }


def _named(kind: str) -> dict[str, Any]:
    """The type and its classes in the modelling file that lies in the folder."""
    name = _CLASSES[kind]
    places = {"AutoConfig": f"{name}Config", "AutoModelForCausalLM": f"{name}ForCausalLM"}
    return {
        "model_type": kind,
        "architectures": [places["AutoModelForCausalLM"]],
        "auto_map": {auto: f"huggingface.{place}" for auto, place in places.items()},
    }


def config_of(values: Any, where: str, dtype: Dtype) -> Config:
    """The config of the model that a `model_config` describes; what trains it keeps our defaults.

    Args:
        values: the dict; fields that neither shape the model nor its depth are ignored.
        where: the prefix of every message, for example `model.pth: model_config.`.
        dtype: of the weights, `bfloat16`, `float32` or `float64`: the type that the model computes in.

    Raises:
        WeightsError: a field that is missing, ill-typed or of a model that this one cannot be, named with its value.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where.rstrip('.')} is not a dict but {type(values).__name__}")
    rope = values.get("rope_settings")
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise WeightsError(f"{where}rope_settings is not a dict but {type(rope).__name__}")
    for given, only, prefix in ((values, {**_WRITTEN, **_ONLY_READ}, where), (rope, _ROPE, f"{where}rope_settings.")):
        for name, value in only.items():
            if given.get(name, value) != value:
                raise WeightsError(f"{prefix}{name}={given[name]!r} cannot be represented here, only {value!r}")

    flat = {name: value for name, value in {**values, **rope}.items() if value is not None}
    # The public code leaves the key heads out where they are not grouped.
    flat.setdefault("num_key_value_heads", flat.get("num_attention_heads"))
    flat.setdefault("num_experts", 0)
    sections: dict[str, dict[str, Any]] = {"model": {}, "moe": {}, "recurrence": {}}
    for section, field, name, required in _FIELDS:
        if flat.get(name) is not None:
            hint = get_type_hints(_SECTIONS[section])[field]
            sections[section][field] = _checked(flat[name], hint, where + name)
        elif required:
            raise WeightsError(f"{where}{name} is missing")
    try:
        return Config(
            model=ModelConfig(
                **sections["model"], dtype=dtype, param_dtype="float64" if dtype == "float64" else "float32"
            ),
            moe=MoEConfig(**sections["moe"]),
            recurrence=RecurrenceConfig(**sections["recurrence"]),
            train=TrainConfig(sequence_length=min(TrainConfig.sequence_length, sections["model"]["max_length"])),
        )
    except ConfigError as error:
        raise WeightsError(f"{where.rstrip('.')} describes no model: {error}") from None


def config_of_huggingface(values: Any, where: str, dtype: Dtype) -> Config:
    """`config_of` for the words of a `config.json`, of the public type or of ours."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (PUBLIC_TYPE, OWN_TYPE):
        raise WeightsError(f"{where}model_type={kind!r} is neither {PUBLIC_TYPE!r} nor {OWN_TYPE!r}")
    if kind == PUBLIC_TYPE:
        renamed = {"n_heads": "num_attention_heads", "vocab_size": "padded_vocab_size"}
        values = {renamed.get(name, name): value for name, value in values.items()}
    return config_of(values, where, dtype)


def _checked(value: Any, hint: Any, name: str) -> Any:
    choices = get_args(hint)
    if choices and value not in choices:
        raise WeightsError(f"{name}={value!r} cannot be represented here, only {' or '.join(map(repr, choices))}")
    if hint is float and type(value) is int:
        return float(value)
    if not choices and type(value) is not hint:
        raise WeightsError(f"{name}={value!r} must be of type {hint.__name__}")
    return value


def _is_public_shape(config: Config) -> bool:
    """Whether the public evaluation script, which builds its model from the name alone, knows this shape by name."""
    model = config.model
    blocks = (model.prelude_layers, model.core_layers, model.coda_layers)
    shape = (model.width, model.heads, model.kv_heads, model.mlp_width, model.vocab_size, blocks)
    return not config.moe.experts and shape == (5280, 55, 55, 17920, 65536, (2, 4, 2))
