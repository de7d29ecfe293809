"""Shared by the tests of generation: small models in float64, and programs that compile three times as fast."""

import jax.numpy as jnp
import numpy as np

from jax_huginn.inference import programs
from jax_huginn.model.huginn import MoEHuginnModel
from tests.support import random_model, small_config

# Both sides of every comparison within a test have these, or none that matters beyond rounding.
programs.OPTIONS["cpu"] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

KINDS = {
    "dense": {"moe": {"experts": 0}},
    "injection": {"moe": {"placement": "injection"}},
    "core": {"moe": {"placement": "core"}},
    "grouped heads": {"moe": {"experts": 0}, "model": {"kv_heads": 2}},
}


def model_of(kind: str = "dense", dtype: str = "float64", **sections: dict) -> MoEHuginnModel:
    """Norms and biases are random too: weights as at the start of training would hide mistakes."""
    every = {"model": {}, **KINDS[kind]}
    every |= {name: every.get(name, {}) | fields for name, fields in sections.items()}
    every["model"] = every["model"] | {"dtype": dtype, "param_dtype": dtype}
    model = random_model(small_config(**every))
    for block in (*model.prelude, *model.core, *model.coda):
        for weight in (block.norm_1, block.norm_2, block.norm_3, block.norm_4):
            weight.weight[...] = 1 + 0.3 * weight.weight[...]
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 96, length).tolist() for length in lengths]


def uncached(model: MoEHuginnModel, text: list[int], recurrence: int) -> np.ndarray:
    """Log-probabilities after every position of a text, (S,V), by one pass without a cache."""
    logits = np.array(model(jnp.asarray([text]), (recurrence, 0)).logits[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
