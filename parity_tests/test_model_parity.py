"""The JAX model and the Torch model are one function: values, statistics and every gradient, in both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests.layers import first_layer_off, layer_outputs
from parity_tests.support import (
    DEPTHS,
    GRADIENTS,
    KINDS,
    VALUES,
    XLAS_OWN_OPTIONS,
    Batch,
    Pair,
    Tensors,
    check,
    jax_gradients,
    jit,
    make_batch,
    make_pair,
    run_jax,
    run_torch,
    split,
    torch_step,
    values_of,
    with_gradients,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])


def check_run(pair: Pair, batch: Batch, n: int, k: int, ours: Tensors, theirs: Tensors) -> None:
    """Values and gradients of a whole run within the tolerances; a failure names the first layer that is off."""

    def explain() -> str:
        return first_layer_off(pair, batch, (n, k), VALUES[pair.dtype])

    both = (*split(ours), *split(theirs))
    check(both[0], both[2], VALUES[pair.dtype], f"values, {pair.dtype}", explain)
    check(both[1], both[3], GRADIENTS[pair.dtype], f"gradients, {pair.dtype}", explain)


@each_dtype
@each_kind
@pytest.mark.parametrize("depth", DEPTHS, ids="n={0[0]},k={0[1]}".format)
def test_values_statistics_and_every_gradient_agree(kind, dtype, depth):
    """Logits, latents, losses, routing and recurrence statistics, and the truncated gradient of every parameter.

    By `training_loss`, where n and k are traced and all but the last depth skip steps of the scan, and again, without
    gradients, by an explicit `num_steps` of the same depth.
    """
    pair = make_pair(kind, dtype)
    batch = make_batch(pair.config)
    check_run(pair, batch, *depth, run_jax(pair, batch, *depth), run_torch(pair.twin, batch, *depth))


@pytest.mark.parametrize("kind", ["grouped", "core"])
def test_values_and_gradients_through_the_explicit_depth_agree(kind):
    """`jax.grad` of `model(tokens, num_steps=(n, k), labels=...)` is the truncated gradient too."""
    pair = make_pair(kind)
    batch = make_batch(pair.config)

    def run(params, n):
        return pair.model(params)(batch.tokens, (n, 2), jnp.asarray(batch.state), batch.labels)

    output, gradients = jit(with_gradients(run))(pair.params, np.int32(3))
    twin_output, twin_gradients = torch_step(pair.twin, batch, 3, 2)
    check(values_of(output), values_of(twin_output), VALUES["float64"], "values, float64")
    check(jax_gradients(gradients), twin_gradients, GRADIENTS["float64"], "gradients, float64")


def test_values_and_gradients_agree_under_the_compilers_own_options():
    """Everywhere else compilation is cut short, see conftest.py and `support.COMPILER_OPTIONS`."""
    pair = make_pair("core")
    batch = make_batch(pair.config)
    state = jnp.asarray(batch.state, pair.dtype)
    run = with_gradients(lambda params, *inputs: pair.model(params).training_loss(*inputs))
    inputs = batch.tokens, batch.labels, np.int32(3), np.int32(2), state
    output, gradients = jax.jit(run, compiler_options=XLAS_OWN_OPTIONS)(pair.params, *inputs)
    twin_output, twin_gradients = torch_step(pair.twin, batch, 3, 2)
    twin_values = values_of(twin_output)
    del twin_values["logits"], twin_values["latents"]  # training returns neither
    check(values_of(output), twin_values, VALUES["float64"], "values, float64")
    check(jax_gradients(gradients), twin_gradients, GRADIENTS["float64"], "gradients, float64")


@each_kind
def test_every_layer_of_the_forward_pass_agrees_in_order(kind):
    """What every norm, attention, MLP, MoE and block returns at every recurrence, from the first to the last."""
    pair = make_pair(kind)
    ours, theirs = layer_outputs(pair, make_batch(pair.config, rows=1), (1, 1))
    check(ours, theirs, VALUES["float64"], "values, float64")


@pytest.mark.parametrize("kind", ["dense", "core"])
def test_without_depth_and_state_both_choose_the_same_depth_and_state(kind):
    """The default: mean recurrence, of it the backpropagation depth with gradient, and the fixed initial state."""
    pair = make_pair(kind)
    batch = make_batch(pair.config)
    ours = jit(lambda params: pair.model(params)(batch.tokens, labels=batch.labels))(pair.params)
    with torch.no_grad():
        theirs = pair.twin(torch.from_numpy(batch.tokens), labels=torch.from_numpy(batch.labels))
    check(values_of(ours), values_of(theirs), VALUES["float64"], "values, float64")
