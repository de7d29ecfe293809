"""Twenty optimiser steps are the same training run in both frameworks."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from conftest import small_config
from jax_huginn.config.schema import Config
from jax_huginn.interop.names import to_torch
from jax_huginn.model.initializers import random_state
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.optimizer import make_optimizer
from jax_huginn.training.step import TrainState, make_train_step
from parity_tests.support import LOSS_CURVE, Tensors, array_of, check, in_forward_order, jit, pair_of
from parity_tests.torch_training import MicroBatch, train

STEPS, ROWS, LENGTH = 20, 4, 64


@dataclasses.dataclass(frozen=True)
class Case:
    optimizer: str
    dtype: str
    micro_batches: int = 1
    placement: str = "injection"

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.placement}-{self.dtype}-micro_batches={self.micro_batches}"


CASES = [
    Case("adamw", "float64"),
    Case("adamw", "float64", micro_batches=2),
    Case("adamw", "float32", micro_batches=2),
    Case("adam_atan2", "float64"),
    Case("adam_atan2", "float64", micro_batches=2, placement="core"),
    Case("adam_atan2", "float32", placement="core"),
    Case("muon", "float64", placement="core"),
    Case("muon", "float32"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def training_config(case: Case) -> Config:
    # AdamW's runs have all of the model's parts; to the other optimisers a prelude would be more of the same.
    parts = {} if case.optimizer == "adamw" else {"prelude_layers": 0, "coda_layers": 0}
    settings = {
        "adamw": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "adam_atan2": {"learning_rate": 5e-3, "weight_decay": 0.01},
        "muon": {"learning_rate": 5e-3, "weight_decay": 0.1},
    }[case.optimizer]
    return small_config(
        model={"core_layers": 1, "dtype": case.dtype, "param_dtype": case.dtype, **parts},
        compute={} if case.optimizer == "adamw" else {"loss_chunk": 256},
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


CURVES = ("loss", "objective", "grad_norm", "learning_rate")


def training_states(config: Config) -> Callable[[int], torch.Tensor]:
    """s_0 by the rule of training: from the run's seed and the number of the micro-batch, its argument."""
    shape = (ROWS // config.train.micro_batches, LENGTH, config.model.width)

    @jit
    def draw(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(config.train.seed), index)
        return random_state(key, shape, jnp.dtype(config.model.dtype))

    return lambda micro_batch: torch.from_numpy(np.array(draw(np.int32(micro_batch))))


@each_case
def test_curves_of_twenty_steps_agree(case):
    """Loss, objective, gradient norm and learning rate of every step, each within the tolerance by itself."""
    ours, _, theirs, _ = both_runs(case)
    each = [
        {f"{name} of step {step + 1}": run[name][step] for step in range(STEPS) for name in CURVES}
        for run in (ours, theirs)
    ]
    check(*each, LOSS_CURVE[case.dtype], f"20 steps of {case.optimizer}, {case.dtype}")


@each_case
def test_final_parameters_agree(case):
    _, ours, _, theirs = both_runs(case)
    check(ours, theirs, LOSS_CURVE[case.dtype], f"parameters after 20 steps of {case.optimizer}, {case.dtype}")


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float64"], ids=str)
def test_the_run_has_learned_clipped_warmed_up_and_met_many_depths(case):
    """So that the curves above compare what they claim to."""
    config = training_config(case)
    curves, *_ = both_runs(case)
    assert curves["loss"][-1] < 0.85 * curves["loss"][0]
    clipped = curves["grad_norm"] > config.optimizer.clip_norm
    assert 3 <= clipped.sum() <= STEPS - 3, curves["grad_norm"]
    peak = config.optimizer.learning_rate
    assert curves["learning_rate"][[0, 10, -1]] == pytest.approx([peak / 5, peak, peak / 5])
    depths = [sample_depths(config.recurrence, 0, step, case.micro_batches) for step in range(STEPS)]
    assert len({(int(n[0]), int(k[0])) for n, k in depths}) >= 4
    assert min(int(k.min()) for _, k in depths) < config.recurrence.backprop_depth


def test_muon_is_torchs_own_but_for_its_precision_and_nesterov(monkeypatch):
    """Twenty steps of torch.optim.Muon on three experts, tall and wide, are ours without Nesterov momentum.

    For this Torch's cast to bfloat16 before Newton-Schulz is a copy. Its Nesterov momentum, (1 - beta) g + beta m,
    cannot be had from optax, which corrects both terms for the moment's zero at the start.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(optax.contrib, "muon", functools.partial(optax.contrib.muon, nesterov=False))
    optimizer = {"name": "muon", "learning_rate": 0.02, "weight_decay": 0.1, "warmup_steps": 0, "clip_norm": 1e9}
    transform = make_optimizer(small_config(optimizer=optimizer))
    generator = np.random.default_rng(3)
    params = {"experts": {name: jnp.asarray(generator.standard_normal((3, *shape))) for name, shape in SHAPES.items()}}
    twins = {name: [torch.tensor(x.T, requires_grad=True) for x in np.asarray(stack)]
             for name, stack in params["experts"].items()}  # fmt: skip
    tensors = [twin for stack in twins.values() for twin in stack]
    torch_muon = torch.optim.Muon(tensors, lr=0.02, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw")
    state, update = transform.init(params), jit(transform.update)
    for _ in range(STEPS):
        gradients = jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape)), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, stack in twins.items():
            for twin, gradient in zip(stack, np.asarray(gradients["experts"][name]), strict=True):
                twin.grad = torch.tensor(gradient.T)
        torch_muon.step()
    ours = {name: np.asarray(stack) for name, stack in params["experts"].items()}
    theirs = {name: np.stack([array_of(twin).T for twin in stack]) for name, stack in twins.items()}
    check(ours, theirs, LOSS_CURVE["float64"], "20 steps of torch.optim.Muon, float64")


SHAPES = {"w_up": (8, 24), "w_down": (24, 8)}
