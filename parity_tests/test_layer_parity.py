"""Every layer alone is the same function in both packages: its output and the gradient of every input and weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_huginn.model.moe import route
from jax_huginn.ops.norm import rms_norm
from jax_huginn.ops.rope import apply_rope, rope_table
from parity_tests.layers import RouterSpy, layer_gradients, twin_layer_gradients
from parity_tests.support import (
    GRADIENTS,
    VALUES,
    Tensors,
    array_of,
    check,
    jit,
    make_pair,
    routing_values,
)
from torch_reference import layers as twin_layers
from torch_reference import moe as twin_moe

each_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])
PRELUDE, TWIN_PRELUDE = "prelude.0", "transformer.prelude.0"


def inputs(dtype: str, *shape: int, seed: int = 5, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(shape or (2, 64, 32))).astype(dtype)


def check_layer(ours: Tensors, theirs: Tensors, dtype: str) -> None:
    output = {"output": ours.pop("output")}
    check(output, {"output": theirs.pop("output")}, VALUES[dtype], f"values, {dtype}")
    check(ours, theirs, GRADIENTS[dtype], f"gradients, {dtype}")


def check_block_part(kind: str, dtype: str, part: str, *, rope: bool) -> None:
    """A part of the first prelude block by its name in JAX, "" for all of it; Torch has the same names."""
    pair = make_pair(kind, dtype)
    layer, twin = pair.model().prelude[0], pair.twin.transformer["prelude"][0]
    layer, twin = (getattr(layer, part), getattr(twin, part)) if part else (layer, twin)
    constants = (pair.model().positions(64),) if rope else ()
    suffix = f".{part}" if part else ""
    x = [inputs(dtype)]
    ours = layer_gradients(layer, x, PRELUDE + suffix, *constants)
    check_layer(ours, twin_layer_gradients(twin, x, TWIN_PRELUDE + suffix), dtype)


@each_dtype
def test_rms_norm_agrees(dtype):
    check_block_part("dense", dtype, "norm_1", rope=False)


@each_dtype
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 1e6])
def test_rms_norm_agrees_where_its_epsilon_matters_and_where_squares_are_large(dtype, size):
    """Epsilon is inside the root and has the same size: a row of rms 1e-3 feels it at full strength."""
    weight = inputs(dtype, 32, seed=1)
    x = inputs(dtype, 8, 32, size=size)
    twin = twin_layers.RMSNorm(32, 1e-6)
    twin.weight.data = torch.from_numpy(weight)
    ours, theirs = rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6), twin(torch.from_numpy(x))
    check({"output": array_of(ours)}, {"output": array_of(theirs)}, VALUES[dtype], f"values, {dtype}")


@each_dtype
def test_rope_agrees_at_every_position_up_to_4096(dtype):
    x = inputs(dtype, 1, 4096, 2, 96)
    ours = apply_rope(jnp.asarray(x), jnp.asarray(rope_table(4096, 96, 50_000.0), dtype))
    theirs = twin_layers.apply_rope(torch.from_numpy(x), 50_000.0)
    last = {"first": slice(0, 64), "middle": slice(64, 4032), "last": slice(4032, None)}
    ours, theirs = ({name: array_of(y)[:, part] for name, part in last.items()} for y in (ours, theirs))
    check(ours, theirs, VALUES[dtype], f"values, {dtype}")


@each_dtype
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_attention_agrees_with_and_without_grouped_key_heads(kind, dtype):
    check_block_part(kind, dtype, "attn", rope=True)


@each_dtype
def test_gated_mlp_agrees(dtype):
    check_block_part("dense", dtype, "mlp", rope=False)


@each_dtype
def test_sandwich_block_agrees(dtype):
    check_block_part("grouped", dtype, "", rope=True)


@each_dtype
def test_adapter_reads_the_state_from_its_first_half_and_the_embedding_from_its_second(dtype):
    pair = make_pair("dense", dtype)
    state, e = inputs(dtype), inputs(dtype, seed=6)
    ours = jnp.concatenate([jnp.asarray(state), jnp.asarray(e)], axis=-1) @ pair.model().adapter[...]
    halves = pair.twin.transformer["adapter"].weight.detach().T.split(32)
    theirs = sum(torch.from_numpy(x) @ half for x, half in zip((state, e), halves, strict=True))
    check({"adapter": array_of(ours)}, {"adapter": array_of(theirs)}, VALUES[dtype], f"values, {dtype}")


# ---- Mixture of Experts -----------------------------------------------------------------------------------------


@each_dtype
def test_moe_agrees(dtype):
    """Shared and routed experts together, with the gradient of the router through the experts' weights."""
    pair = make_pair("injection", dtype)
    x = [inputs(dtype)]
    ours = layer_gradients(pair.model().moe, x, "moe")
    check_layer(ours, twin_layer_gradients(pair.twin.transformer["moe"], x, "transformer.moe"), dtype)


@each_dtype
def test_sandwich_block_with_a_moe_agrees(dtype):
    pair = make_pair("core", dtype)
    x = [inputs(dtype)]
    ours = layer_gradients(pair.model().core[0], x, "core.0", pair.model().positions(64))
    twin = pair.twin.transformer["core_block"][0]
    check_layer(ours, twin_layer_gradients(twin, x, "transformer.core_block.0"), dtype)


@each_dtype
def test_single_expert_agrees(dtype):
    pair = make_pair("injection", dtype)
    x = [inputs(dtype, 128, 32)]
    ours = layer_gradients(pair.model().moe.shared, x, "moe.shared")
    name = "transformer.moe.shared_expert"
    check_layer(ours, twin_layer_gradients(pair.twin.get_submodule(name), x, name), dtype)


@each_dtype
def test_router_weights_choices_and_statistics_agree(dtype):
    """The same experts in the same order, the same weights, counts equal as integers."""
    pair = make_pair("injection", dtype)
    x = inputs(dtype, 128, 32)
    experts, weights, routing = route(jnp.asarray(x), pair.model().moe.router[...], 2)
    with RouterSpy() as spy:
        _, twin_routing = pair.twin.transformer["moe"](torch.from_numpy(x)[None])
    ours = {"choices": np.asarray(experts, np.int64), "weights": np.asarray(weights), **routing_values(routing)}
    theirs = {"choices": spy.orders[0][:, :2], "weights": spy.weights[0], **routing_values(twin_routing)}
    check(ours, theirs, VALUES[dtype], f"values, {dtype}")
    assert routing_values(routing)["counts_QE"].sum() == 2 * len(x)


@each_dtype
@pytest.mark.parametrize("name", ["balance_loss", "z_loss", "entropy"])
def test_balance_and_z_loss_agree_with_their_gradients(name, dtype):
    """The counts inside the balance loss carry no gradient; the probabilities do."""
    pair = make_pair("injection", dtype)
    x = inputs(dtype, 128, 32)

    def loss(x, router):
        return getattr(route(x, router, 2)[2], name)

    value, (d_x, d_router) = jit(jax.value_and_grad(loss, (0, 1)))(x, pair.model().moe.router[...])
    twin = pair.twin.transformer["moe"]
    leaf = torch.from_numpy(x).requires_grad_()
    statistics = twin(leaf[None])[1]
    twin_value = getattr(statistics, name)
    gradients = torch.autograd.grad(twin_value, [leaf, twin.router.weight])
    check({name: array_of(value)}, {name: array_of(twin_value)}, VALUES[dtype], f"values, {dtype}")
    ours = {"d x": array_of(d_x), "d router": array_of(d_router).T}
    theirs = dict(zip(ours, map(array_of, gradients), strict=True))
    check(ours, theirs, GRADIENTS[dtype], f"gradients, {dtype}")


@each_dtype
def test_ties_go_to_the_expert_of_the_lower_index_in_both(dtype):
    """`lax.top_k` promises this and the Torch model sorts stably, so ties are the same choice, not only as good.

    Small integers make every logit exact, hence the ties: all equal; the lower two; the upper two; second and third.
    """
    pair = make_pair("injection", dtype)
    logits = np.array([[2, 2, 2, 2], [3, 3, 1, 1], [0, 1, 4, 4], [9, 5, 5, 1], [1, 1, 1, 7]])
    x, router = np.eye(5, 32).astype(dtype), np.zeros((32, 4), dtype)
    router[:5] = logits
    experts, weights, _ = route(jnp.asarray(x), jnp.asarray(router), 2)
    twin = twin_moe.MoE(pair.twin.config).to(getattr(torch, dtype))
    twin.router.weight.data = torch.from_numpy(router.T.copy())
    with torch.no_grad(), RouterSpy() as spy:
        twin(torch.from_numpy(x)[None])
    assert experts.tolist() == spy.orders[0][:, :2].tolist() == [[0, 1], [0, 1], [2, 3], [0, 1], [3, 0]]
    check({"weights": array_of(weights)}, {"weights": spy.weights[0]}, VALUES[dtype], f"values, {dtype}")


@each_dtype
def test_a_collapsed_router_loses_no_token(dtype):
    """Every token's first choice is expert 2: the fullest group that can be, in values and gradients."""
    pair = make_pair("injection", dtype)
    params = jax.tree.map(lambda x: x, pair.params)
    params["moe"]["router"] = pair.params["moe"]["router"].at[:, 2].set(0.3)
    twin = twin_moe.MoE(pair.twin.config).to(getattr(torch, dtype))
    twin.load_state_dict(pair.twin.transformer["moe"].state_dict())
    twin.router.weight.data[2] = 0.3
    x = [np.abs(inputs(dtype))]
    layer = pair.model(params).moe
    ours = layer_gradients(layer, x, "moe")
    check_layer(ours, twin_layer_gradients(twin, x, "transformer.moe"), dtype)
    ours, theirs = (routing_values(m) for m in (layer(jnp.asarray(x[0]))[1], twin(torch.from_numpy(x[0]))[1]))
    check(ours, theirs, VALUES[dtype], f"values, {dtype}")
    assert ours["first_choice_E"].tolist() == [0, 0, 128, 0]
