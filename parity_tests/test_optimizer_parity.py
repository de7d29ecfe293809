"""Twenty optimiser steps are the same training run in both frameworks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from jax_huginn.training.depth import sample_depths
from jax_huginn.training.optimizer import make_optimizer
from parity_tests.support import LOSS_CURVE, array_of, check, jit
from parity_tests.training_runs import CURVES, STEPS, Case, both_runs, training_config
from tests.support import small_config

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
# The scope puts the tests of a case together, so that workers of pytest-xdist seldom make the same runs twice.
each_case = pytest.mark.parametrize("case", CASES, ids=str, scope="module")


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


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float64"], ids=str, scope="module")
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


def test_muon_is_torchs_own_except_its_precision_and_nesterov(monkeypatch):
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
