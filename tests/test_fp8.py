"""Training in 8-bit floats: the matmul equals its definition, and only the matmuls of the recurrences are changed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from jax_huginn.model import functional
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.ops.fp8 import Fp8Weight, copies_of, matmul, quantized
from tests.support import random_model

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def rounded(x, dtype, axis):
    """The float64 values that x stands for in an 8-bit type, with a scale for each row (axis -1) or one (None)."""
    scale = np.abs(x).max(axis, keepdims=True) / float(jnp.finfo(dtype).max)
    return np.asarray((x / scale).astype(dtype), np.float64) * scale


def test_the_matmul_is_that_of_the_rounded_values_with_its_gradients():
    rng = np.random.default_rng(0)
    x, w, d_y = rng.normal(size=(2, 5, 48)), rng.normal(size=(48, 32)), rng.normal(size=(2, 5, 32))
    fast, vjp = jax.vjp(lambda x, w: matmul(x, Fp8Weight(w, copies_of(w))), jnp.asarray(x), jnp.asarray(w))
    rounded_w = rounded(w, E4M3, None)
    np.testing.assert_allclose(fast, rounded(x, E4M3, -1) @ rounded_w, rtol=1e-12, atol=1e-12)
    d_x, d_w = vjp(jnp.asarray(d_y))
    np.testing.assert_allclose(d_x, rounded(d_y, E5M2, -1) @ rounded_w.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d_w, np.einsum("bsi,bso->io", x, d_y), rtol=1e-12, atol=1e-12)
    exact = x @ w
    assert 0.01 < np.linalg.norm(fast - exact) / np.linalg.norm(exact) < 0.05


def test_each_token_has_a_scale_of_its_own():
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    w = jnp.ones((32, 16), jnp.float32)
    plain = matmul(jnp.asarray(x), Fp8Weight(w, copies_of(w)))
    x[1] *= 2.0**40
    x[2] = 0
    x[3, 0], x[4, 0] = np.nan, np.inf
    result = matmul(jnp.asarray(x), Fp8Weight(w, copies_of(w)))
    assert np.array_equal(result[jnp.array([0, 5])], plain[jnp.array([0, 5])])
    assert np.array_equal(result[1], plain[1] * 2.0**40)
    assert np.array_equal(result[2], np.zeros(16))
    assert np.isnan(result[3:5]).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_largest_value_is_the_largest_of_the_type(dtype):
    rows, scale = quantized(jnp.asarray([[3.0, -7.0], [1e-42, 0.0]], jnp.float32), dtype)
    assert float(rows[0, 1]) == -float(jnp.finfo(dtype).max)
    assert np.isfinite(np.asarray(rows, np.float32)).all() and (np.asarray(scale) > 0).all()


def test_only_the_recurrences_of_training_multiply_in_8_bits(make_config):
    config = make_config(compute={"fp8": True}, recurrence={"mean": 4, "backprop_depth": 2})
    model = random_model(config)
    tokens, state = jnp.zeros((1, 64), jnp.int32), jnp.zeros((64, config.model.width))
    matmuls = 4 * config.model.core_layers + 1

    def text(function):
        return jax.jit(function).lower(state).as_text()

    training = text(lambda state: model.training_loss(tokens, tokens, 2, 2, state).loss)
    assert len(re.findall(r"dot_general .*f8E4M3FN", training)) == 2 * matmuls  # a loop's and a scan's body
    assert "f8E" not in text(lambda state: model.training_loss(tokens, tokens, 4, 0, state).loss)
    assert "f8E" not in text(lambda state: model(tokens, (2, 2), state).logits)


def test_the_gradients_of_a_pass_are_near_those_in_full_precision(make_config):
    """Whether the steps are a scan, written out, or a loop of traced length; the copies are made once for all."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 32)), jnp.int32)
    sections = {"recurrence": {"mean": 4, "backprop_depth": 2}, "moe": {"placement": "core"}}

    def gradient(k, **compute):
        config = make_config(compute={"remat": "dots", **compute}, **sections)
        graphdef, params = functional.split(MoEHuginnModel(config))
        state = jnp.ones((32, config.model.width))

        def loss(params, k=k):
            return nnx.merge(graphdef, params).training_loss(tokens, tokens, 1, k, state).loss

        value = jax.jit(jax.grad(loss))(params) if isinstance(k, int) else jax.jit(jax.grad(loss))(params, k)
        return ravel_pytree(value)[0]

    exact = gradient(2)
    for k, unroll in [(2, False), (2, True), (np.int32(2), False)]:
        close = gradient(k, unroll=unroll, fp8=True)
        assert 0.002 < jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact) < 0.2
