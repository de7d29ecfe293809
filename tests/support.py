"""Shared by tests/, parity_tests/ and scripts/: float64, no network, and a small config that has every part."""

import dataclasses
import os

# No test may reach a network: a hub that does not answer would cost minutes of retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

jax.config.update("jax_enable_x64", True)

from jax_huginn.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RecurrenceConfig,
    TrainConfig,
)
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model

HANGS = 900
"""Seconds that only a process that hangs takes, however busy the machine is."""


def small_config(**sections: dict) -> Config:
    """A model of every part in a few thousand parameters; `small_config(moe={"experts": 0})` changes fields."""
    config = Config(
        model=ModelConfig(
            vocab_size=96,
            width=32,
            heads=4,
            kv_heads=4,
            mlp_width=48,
            prelude_layers=1,
            core_layers=2,
            coda_layers=1,
            max_length=128,
            dtype="float32",
        ),
        compute=ComputeConfig(remat="none", loss_chunk=48),
        moe=MoEConfig(experts=4, active=2, width=24, z_weight=0.001),
        recurrence=RecurrenceConfig(mean=6, backprop_depth=4),
        train=TrainConfig(steps=20, batch_size=4, sequence_length=64),
        data=DataConfig(source="stdlib"),
    )
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


def random_model(config: Config) -> MoEHuginnModel:
    """A model whose weights, norms included, are all random, so that any exchange shows; quicker than initialising."""
    graphdef, params = abstract_model(config)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), params)
    return nnx.merge(graphdef, params)
