"""Shared by the tests of other layouts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_huginn.config.schema import Config
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model


def random_model(config: Config) -> MoEHuginnModel:
    """A model of random weights, the norms too: an exchange of two would show. Not initialised, which takes seconds."""
    graphdef, params = abstract_model(config)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), params)
    return nnx.merge(graphdef, params)
