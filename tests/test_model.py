"""The model's contracts: depth, gradients, causality, statistics, memory. Its numbers are parity_tests' business."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_huginn.model import initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.model.moe import route
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.recurrence import SUMMED_AT_ONCE, Plan, iterate
from jax_huginn.ops.cross_entropy import token_losses


def tokens_of(config, seed=0):
    shape = (2, config.train.sequence_length)
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.model.vocab_size, shape), jnp.int32)


def distance(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.linalg.norm(x - y) / (jnp.linalg.norm(y) + 1e-30)) for x, y in leaves)


PLACEMENTS = [
    {"experts": 0},
    {"placement": "injection"},
    {"placement": "injection", "residual": True},
    {"placement": "core"},
]


@pytest.mark.parametrize("moe", PLACEMENTS[1::2], ids=["injection", "core"])
def test_one_compilation_serves_every_sampled_depth(make_config, moe):
    """Losses and gradients at traced (n, k) equal those at static ones, and the step is traced once."""
    float64 = {"dtype": "float64", "param_dtype": "float64"}
    config = make_config(moe=moe, model=float64 | {"core_layers": 1, "prelude_layers": 0, "coda_layers": 0})
    graphdef, params = nnx.split(MoEHuginnModel(config))
    params, tokens = nnx.as_pure(params), tokens_of(config)
    state = jnp.asarray(initializers.fixed_state(0, tokens.shape[1], config.model.width))
    traces = []

    @jax.jit
    def traced(params, n, k):
        traces.append(None)
        return jax.value_and_grad(
            lambda params: nnx.merge(graphdef, params).training_loss(tokens, tokens, n, k, state).loss
        )(params)

    for n, k in [(3, 2), (1, 4)]:
        loss = lambda params, n=n, k=k: nnx.merge(graphdef, params)(tokens, (n, k), state, tokens).loss  # noqa: E731
        static = jax.jit(jax.value_and_grad(loss))(params)
        assert distance(traced(params, np.int32(n), np.int32(k)), static) < 1e-11
    assert len(traces) == 1


@pytest.mark.parametrize("remat", ["dots", "dots_except_gate_up", "attention", "full"])
def test_rematerialisation_changes_memory_but_not_gradients(make_config, remat):
    def loss(remat):
        config = make_config(compute={"remat": remat}, model={"dtype": "float64", "param_dtype": "float64"})
        graphdef, params = nnx.split(MoEHuginnModel(config, seed=0))
        tokens = tokens_of(config)
        gradient = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(tokens, (1, 4), labels=tokens).loss))
        compiled = gradient.lower(nnx.as_pure(params)).compile()
        return compiled(nnx.as_pure(params)), compiled.memory_analysis().temp_size_in_bytes

    (gradients, memory), (reference, reference_memory) = loss(remat), loss("none")
    assert distance(gradients, reference) < 1e-11
    assert memory < reference_memory


@pytest.mark.parametrize("moe", PLACEMENTS[::3], ids=["dense", "core"])
def test_what_each_policy_multiplies_again(make_config, moe):
    """One block: attention's scores, which no kernel hides here; gate and up as well; all but attention's; all.

    Gate and up are one matmul of an MLP, four of shared and routed experts, whose dispatch counts by two more.
    """

    def matmuls(remat):
        layers = {"core_layers": 1, "prelude_layers": 0, "coda_layers": 0}
        config = make_config(moe=moe, compute={"remat": remat}, model=layers)
        graphdef, params = nnx.split(MoEHuginnModel(config, seed=0))
        tokens = tokens_of(config)
        loss = lambda params: nnx.merge(graphdef, params)(tokens, (0, 1), labels=tokens).loss  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(nnx.as_pure(params))).count("dot_general")

    none, *again = (matmuls(remat) for remat in ("none", "dots", "dots_except_gate_up", "attention", "full"))
    scores, gate_up, attention, full = (count - none for count in again)
    assert scores == 1
    assert gate_up == scores + (1 if moe.get("experts") == 0 else 4 + 2)
    assert gate_up < attention < full


@pytest.mark.parametrize("moe", PLACEMENTS[::3], ids=["dense", "core"])
def test_steps_written_out_have_the_gradients_of_a_loop(make_config, moe):
    """Where k is no multiple of what is added up at once."""
    k = SUMMED_AT_ONCE + 1

    def gradients(unroll):
        compute = {"unroll": unroll, "remat": "dots"}
        model = {"dtype": "float64", "param_dtype": "float64", "core_layers": 1}
        config = make_config(moe=moe, compute=compute, model=model, recurrence={"mean": 8, "backprop_depth": k})
        graphdef, params = nnx.split(MoEHuginnModel(config))
        tokens = tokens_of(config)
        loss = lambda params: nnx.merge(graphdef, params)(tokens, (2, k), labels=tokens).loss  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(nnx.as_pure(params))

    assert distance(gradients(True), gradients(False)) < 1e-11


def test_a_step_written_out_waits_for_the_gradients_of_those_after_it():
    """Backwards, each step's own gradients pass a barrier, and every few steps all sums; forwards there is none."""
    steps = 2 * SUMMED_AT_ONCE

    def core(inputs, state):
        params, injected = inputs
        return jnp.tanh(state * params + injected), None

    def final(params, injected, state):
        return iterate(core, (params, injected), state, 0, steps, Plan(steps, lambda step: step, True)).state_BSD.sum()

    inputs = jnp.ones(()), jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3))
    forward, backward = (jax.jit(f).lower(*inputs).as_text() for f in (final, jax.grad(final, argnums=(0, 1))))
    barrier = r"optimization_barrier .*: tensor<f64>, tensor<1x2x3xf64>, tensor<1x2x3xf64>"
    assert "optimization_barrier" not in forward
    assert len(re.findall(barrier, backward)) == steps + 2


@pytest.mark.parametrize("moe", PLACEMENTS[::3], ids=["dense", "core"])
def test_no_position_sees_a_later_one(make_config, moe):
    config = make_config(moe=moe)
    model, tokens = MoEHuginnModel(config), tokens_of(config)
    changed = tokens.at[:, 40].set((tokens[:, 40] + 1) % config.model.vocab_size)
    difference = jnp.abs(model(tokens, (2, 1)).logits - model(changed, (2, 1)).logits).max(axis=(0, 2))
    assert difference[:40].max() == 0
    assert (difference[40:] > 0).mean() > 0.9


def test_logits_loss_and_labels(make_config):
    config = make_config()
    model, tokens = MoEHuginnModel(config), tokens_of(config)
    labels = tokens.at[:, :7].set(-100)
    output = model(tokens, (2, 2), labels=labels)
    assert output.logits.shape == (*tokens.shape, config.model.vocab_size)
    assert output.logits.dtype == jnp.float32
    assert float(output.log_ppl) == pytest.approx(float(token_losses(output.logits, labels)[:, 7:].mean()), rel=1e-5)
    expected = output.log_ppl + 0.01 * output.moe.balance_loss + 0.001 * output.moe.z_loss
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)
    assert model(tokens, (2, 2)).loss is None


def test_default_depth_is_the_mean(make_config):
    config = make_config()
    model, tokens = MoEHuginnModel(config), tokens_of(config)
    assert jnp.array_equal(model(tokens).logits, model(tokens, (2, 4)).logits)
    assert not jnp.array_equal(model(tokens).logits, model(tokens, (1, 4)).logits)


def test_bfloat16_computes_in_bfloat16_and_routes_in_float32(make_config):
    config = make_config(model={"dtype": "bfloat16"})
    model, tokens = MoEHuginnModel(config), tokens_of(config)
    output = model(tokens, (2, 1), labels=tokens)
    assert output.latents.dtype == jnp.bfloat16
    assert output.logits.dtype == output.log_ppl.dtype == output.moe.entropy.dtype == jnp.float32
    params = cast_params(nnx.as_pure(nnx.split(model)[1]), "bfloat16")
    types = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert [path for path, dtype in types.items() if dtype != jnp.bfloat16] == ["['moe']['router']"]
    reference = MoEHuginnModel(make_config())(tokens, (2, 1), labels=tokens)
    assert float(output.log_ppl) == pytest.approx(float(reference.log_ppl), abs=0.05)


def test_initial_state_depends_on_seed_and_position_alone():
    state = initializers.fixed_state(0, 10, 4096)
    assert np.array_equal(state[4:], initializers.fixed_state(0, 6, 4096, start=4))
    assert not np.array_equal(state, initializers.fixed_state(1, 10, 4096))
    assert np.abs(state).max() <= 3 * 0.4**0.5
    assert state.var() == pytest.approx(0.389, abs=0.01)
    random = initializers.random_state(jax.random.key(0), (4, 10, 1024), jnp.bfloat16)
    assert float(random.astype(jnp.float32).var()) == pytest.approx(0.389, abs=0.01)


def test_recurrence_statistics(make_config):
    """residual is ||s_R - s_{R-1}||; correlations are the mean of all pairs of centred unit tokens."""
    config = make_config(model={"dtype": "float64", "param_dtype": "float64"})
    model, tokens = MoEHuginnModel(config), tokens_of(config)
    output = model(tokens, (1, 3))
    without_gradient = model(tokens, (4, 0))
    for name, value in without_gradient.recurrence.items():
        assert float(value) == pytest.approx(float(output.recurrence[name]), rel=1e-10), name
    model.norm_f.weight[...] = jnp.ones(32)
    # The core ends in a norm of weight 1, so the latents of norm_f with weight 1 are the states themselves.
    s_3, s_4 = (np.asarray(model(tokens, (depth, 0)).latents) for depth in (3, 4))
    residual = np.linalg.norm(s_4 - s_3, axis=-1).mean()
    assert float(output.recurrence["recurrent_residual"]) == pytest.approx(residual, rel=1e-5)
    relative = output.recurrence["recurrent_residual"] / output.recurrence["recurrent_state_norm"]
    assert float(output.recurrence["rel_residual"]) == pytest.approx(float(relative), rel=1e-12)
    latents = np.asarray(output.latents)
    centred = latents - latents.mean(-1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    pairs = np.einsum("bsd,btd->bst", unit, unit)
    assert float(output.recurrence["recurrent_state_token_corr"]) == pytest.approx(pairs.mean() - 1 / 64, rel=1e-9)


def test_the_router_asks_for_all_bits_of_float32_in_its_gradients_too():
    """The default would be TF32 on a GPU."""

    def run(x_TD, router_DE):
        return route(x_TD, router_DE, 1)[2].z_loss

    gradients = jax.jit(jax.grad(run, argnums=(0, 1))).lower(jnp.ones((6, 4), "bfloat16"), jnp.ones((4, 2), "bfloat16"))
    products = [line for line in gradients.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("precision = [HIGHEST, HIGHEST]" in line and "xf32>" in line for line in products)


def test_router_statistics_by_hand():
    """Three tokens, two experts, one choice: f = (2/3, 1/3)."""
    logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]))
    experts, weights, routing = route(jnp.asarray(logits), jnp.eye(2), 1)
    assert experts.ravel().tolist() == [0, 0, 1]
    assert weights.ravel().tolist() == [1, 1, 1]
    np.testing.assert_allclose(routing.counts_E, [2, 1])
    np.testing.assert_allclose(routing.probability_E, [0.5, 0.5])
    assert float(routing.balance_loss) == pytest.approx(2 * (2 / 3 * 0.5 + 1 / 3 * 0.5))
    assert float(routing.z_loss) == pytest.approx(0, abs=1e-20)
    entropies = -(np.exp(logits) * logits).sum(-1)
    assert float(routing.entropy) == pytest.approx(entropies.mean())


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    even = jnp.tile(jnp.eye(4) * 0.01, (3, 1))
    assert float(route(even, jnp.eye(4), 1)[2].balance_loss) == pytest.approx(1, abs=1e-3)
    collapsed = jnp.tile(jnp.array([50.0, 0, 0, 0]), (12, 1))
    assert float(route(collapsed, jnp.eye(4), 1)[2].balance_loss) == pytest.approx(4)


def test_a_sequence_longer_than_the_model_is_refused(make_config):
    config = make_config()
    with pytest.raises(ValueError, match=r"129 tokens.*max_length=128"):
        MoEHuginnModel(config)(jnp.zeros((1, 129), jnp.int32), (0, 1))


@pytest.mark.parametrize("moe", PLACEMENTS[1:], ids=["injection", "residual", "core"])
def test_w_down_is_an_output_projection_where_the_moe_is_a_residual_branch(make_config, moe):
    """sqrt(2/(5 D)), over sqrt(2 L) in a branch; L = 1 + 2 x 6 + 1."""
    model = MoEHuginnModel(make_config(moe=moe | {"width": 256}, model={"width": 64}))
    layer = model.moe or model.core[0].moe
    expected = 0.987 * (2 / (5 * 64)) ** 0.5 / (28**0.5 if len(moe) > 1 or moe["placement"] == "core" else 1)
    for expert in (layer.shared, layer.experts):
        assert float(expert.w_down[...].std()) == pytest.approx(expected, rel=0.03)
        assert float(expert.w_up[...].std()) == pytest.approx(0.987 * (2 / (5 * 64)) ** 0.5, rel=0.03)


def test_seeds_make_weights(make_config):
    config = make_config()
    weights = [nnx.as_pure(nnx.split(MoEHuginnModel(config, seed=seed))[1]) for seed in (0, 0, 1)]
    assert distance(weights[0], weights[1]) == 0
    assert distance(weights[0], weights[2]) > 1
    assert distance(weights[0], nnx.as_pure(nnx.split(MoEHuginnModel(dataclasses.replace(config)))[1])) == 0
