"""Expert parallelism on 1, 2, 4 and 8 devices against every expert on every token, values and gradients, float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_huginn.config.schema import ParallelConfig
from jax_huginn.ops.grouped_mlp import grouped_mlp_oracle
from jax_huginn.parallel.expert import dispatch
from jax_huginn.parallel.mesh import BATCH, REPLICATED, per_device
from tests.parallel_cases.support import mesh_config, mesh_of, relative

T, D, E, A, M = 64, 16, 8, 2, 12
EXPERTS = PartitionSpec("expert")
MESHES = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 2, 2)]


def routing(case: str) -> np.ndarray:
    """Which experts each token visits, (T,A)."""
    random = np.random.default_rng(0)
    share = {
        "unbalanced": np.array([40, 20, 10, 5, 3, 2, 1, 1.0]),
        "all to one": np.array([1e9, 1, 1, 1, 1, 1, 1, 1]),
        "one with none": np.array([1, 1, 1, 0, 1, 1, 1, 1.0]),
    }[case]
    experts = np.stack([random.choice(E, A, replace=False, p=share / share.sum()) for _ in range(T)]).astype(np.int32)
    if case == "all to one":
        assert (experts[:, 0] == 0).all()
    if case == "one with none":
        assert 3 not in experts
    return experts


@cache
def inputs() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(1)
    shapes = [(T, D), (T, A), (E, D, M), (E, D, M), (E, M, D), (T, D)]
    return tuple(random.normal(size=shape) / 3 for shape in shapes)


@cache
def compiled(method: str, sizes: tuple[int, int, int], capacity_factor: float):
    """experts_TA, inputs -> (y, dropped), gradients; one compilation for every routing."""
    mesh = mesh_of(mesh_config(sizes))
    config = ParallelConfig(data=1, dispatch=method, capacity_factor=capacity_factor)  # pyright: ignore[reportArgumentType]

    def local(experts_TA, x_TD, weights_TA, *weights):
        return tuple(dispatch(config, x_TD, experts_TA, weights_TA, weights))

    in_specs = (BATCH, BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS)
    run = per_device(local, mesh, in_specs, (BATCH, REPLICATED))

    def loss(inputs, experts_TA, cotangent_TD):
        y_TD, dropped = run(experts_TA, *inputs)
        return jnp.sum(y_TD * cotangent_TD), (y_TD, dropped)

    return jax.jit(jax.grad(loss, has_aux=True))


@cache
def oracle():
    def loss(inputs, experts_TA, cotangent_TD):
        x_TD, weights_TA, *weights = inputs
        y_TD = grouped_mlp_oracle(x_TD, experts_TA, weights_TA, *weights)
        return jnp.sum(y_TD * cotangent_TD), y_TD

    return jax.jit(jax.grad(loss, has_aux=True))


def require_equal(method, sizes, capacity_factor, experts_TA, kept_TA=None):
    *arguments, cotangent_TD = inputs()
    gradients, (y_TD, dropped) = compiled(method, sizes, capacity_factor)(tuple(arguments), experts_TA, cotangent_TD)
    if kept_TA is not None:
        arguments[1] = arguments[1] * kept_TA
    expected, expected_TD = oracle()(tuple(arguments), experts_TA, cotangent_TD)
    if kept_TA is not None:
        expected = (expected[0], expected[1] * kept_TA, *expected[2:])
    assert relative(expected_TD, y_TD) < 1e-12
    for name, a, b in zip(("x", "weights", "w_gate", "w_up", "w_down"), expected, gradients, strict=True):
        assert relative(a, b) < 1e-11, name
    return float(dropped)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_dispatch_is_the_oracle(method, sizes):
    for case in ("unbalanced", "all to one", "one with none"):
        assert require_equal(method, sizes, float(E), routing(case)) == 0


def test_what_finds_no_place_is_dropped_by_order_and_counted():
    """8 devices of 8 tokens, 2 x 8 assignments each over 8 experts: capacity 1 x 2 = 2 for each expert and device."""
    experts_TA = routing("unbalanced")
    kept_TA = np.zeros((T, A))
    for device in range(8):
        taken = np.zeros(E, int)
        for token in range(8 * device, 8 * device + 8):
            for choice in range(A):
                expert = experts_TA[token, choice]
                kept_TA[token, choice] = taken[expert] < 2
                taken[expert] += 1
    assert 20 < (kept_TA == 0).sum() < T * A
    dropped = require_equal("all_to_all", (1, 1, 8), 1.0, experts_TA, kept_TA)
    assert dropped == (kept_TA == 0).sum()
