"""Shared by the tests of generation: small models in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_huginn.model import functional
from jax_huginn.model.huginn import MoEHuginnModel
from tests.support import random_model, small_config

KINDS = {
    "dense": {"moe": {"experts": 0}},
    "injection": {"moe": {"placement": "injection"}},
    "core": {"moe": {"placement": "core"}},
    "grouped heads": {"moe": {"experts": 0}, "model": {"kv_heads": 2}},
}


def model_of(kind: str = "dense", dtype: str = "float64", **sections: dict) -> MoEHuginnModel:
    """Random weights, norms and biases too, at which states settle: within 8 recurrences they move by a tenth."""
    every = {"model": {}, **KINDS[kind]}
    every |= {name: every.get(name, {}) | fields for name, fields in sections.items()}
    every["model"] = every["model"] | {"dtype": dtype, "param_dtype": dtype}
    model = random_model(small_config(**every))
    settling = lambda leaf: 0.15 * leaf if leaf.ndim > 1 else 1 + 0.3 * leaf  # noqa: E731
    return functional.with_params(model, jax.tree.map(settling, functional.params_of(model)))


def prompts_of(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 96, length).tolist() for length in lengths]


def uncached(model: MoEHuginnModel, text: list[int], recurrence: int) -> np.ndarray:
    """Log-probabilities after every position of a text, (S,V), by one pass without a cache."""
    graphdef, params = functional.split(model)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens, (recurrence, 0)).logits[0])
    tokens = jnp.asarray([text])
    program = run.lower(params, tokens).compile()
    logits = np.array(program(params, tokens), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
