"""The same twenty optimiser steps in JAX and in Torch, for the tests and for the plot of docs/parity.md."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_huginn.config.schema import Config
from jax_huginn.interop.names import to_torch
from jax_huginn.model.initializers import random_state
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.optimizer import make_optimizer
from jax_huginn.training.step import TrainState, make_train_step
from parity_tests.support import Tensors, array_of, in_forward_order, jit, pair_of
from parity_tests.torch_training import MicroBatch, train
from tests.support import small_config

STEPS, ROWS, LENGTH = 20, 4, 64
CURVES = ("loss", "objective", "grad_norm", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Case:
    optimizer: str
    dtype: str
    micro_batches: int = 1
    placement: str = "injection"

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.placement}-{self.dtype}-micro_batches={self.micro_batches}"


def training_config(case: Case) -> Config:
    # AdamW's runs have all of the model's parts; to the other optimisers a prelude would be more of the same.
    parts = {} if case.optimizer == "adamw" else {"prelude_layers": 0, "coda_layers": 0}
    # Without remat a step has two gradient paths, one for the usual k and one for smaller k, and compiles half as long
    # again. The runs with micro-batches, one of them with a routed core, have both paths.
    remat = "full" if case.micro_batches == 1 else "none"
    settings = {
        "adamw": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "adam_atan2": {"learning_rate": 5e-3, "weight_decay": 0.01},
        "muon": {"learning_rate": 5e-3, "weight_decay": 0.1},
    }[case.optimizer]
    return small_config(
        model={"core_layers": 1, "dtype": case.dtype, "param_dtype": case.dtype, **parts},
        compute={"remat": remat} | ({} if case.optimizer == "adamw" else {"loss_chunk": 256}),
        moe={"placement": case.placement},
        train={"steps": STEPS, "batch_size": ROWS, "sequence_length": LENGTH, "micro_batches": case.micro_batches},
        optimizer={"name": case.optimizer, "warmup_steps": 5, "cooldown_steps": 5, "clip_norm": 1.3, **settings},
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of every step, (STEPS, ROWS, LENGTH): rows that count on by a step of 1 to 3, learnable."""
    generator = np.random.default_rng(7)
    start, stride = generator.integers(0, 96, (STEPS, ROWS, 1)), generator.integers(1, 4, (STEPS, ROWS, 1))
    text = (start + stride * np.arange(LENGTH + 1)) % 96
    labels = text[..., 1:].copy()
    labels[..., ::9] = -100
    return text[..., :-1], labels


@functools.cache
def both_runs(case: Case) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """Curves and final parameters in JAX, curves and final parameters in Torch."""
    config, micro_batches = training_config(case), case.micro_batches
    pair = pair_of(config)
    tokens, labels = data()
    depths = [sample_depths(config.recurrence, config.train.seed, step, micro_batches) for step in range(STEPS)]

    state = TrainState(
        pair.params, make_optimizer(config).init(pair.params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    )
    step = jit(make_train_step(config))
    records = []
    for batch in zip(tokens, labels, depths, strict=True):
        state, metrics = step(state, batch[0], batch[1], *batch[2])
        records.append({name: float(getattr(metrics, name)) for name in CURVES})

    initial_state = training_states(config)
    twin_records = train(pair.twin, config, [
        [
            MicroBatch(
                tokens=torch.from_numpy(tokens[i].reshape(micro_batches, -1, LENGTH)[j]),
                labels=torch.from_numpy(labels[i].reshape(micro_batches, -1, LENGTH)[j]),
                depth=(int(depths[i][0][j]), int(depths[i][1][j])),
                initial_state=initial_state(i * micro_batches + j),
            )
            for j in range(micro_batches)
        ]
        for i in range(STEPS)
    ])  # fmt: skip
    finals = {name: np.asarray(value) for name, value in to_torch(state.params)}
    twin_finals = {name: array_of(weight) for name, weight in pair.twin.named_parameters()}
    return (
        {name: np.array([record[name] for record in records]) for name in CURVES},
        in_forward_order(finals),
        {name: np.array([getattr(record, name) for record in twin_records]) for name in CURVES},
        in_forward_order(twin_finals),
    )


def training_states(config: Config) -> Callable[[int], torch.Tensor]:
    """s_0 by the rule of training: from the run's seed and the number of the micro-batch, its argument."""
    shape = (ROWS // config.train.micro_batches, LENGTH, config.model.width)

    @jit
    def draw(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(config.train.seed), index)
        return random_state(key, shape, jnp.dtype(config.model.dtype))

    return lambda micro_batch: torch.from_numpy(np.array(draw(np.int32(micro_batch))))
