"""The optimiser step: accumulation, clipping, decay, schedule, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_huginn.model import initializers
from jax_huginn.model.flops import forward_flops, peak_flops, training_flops
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.moe import Routing
from jax_huginn.ops.cross_entropy import IGNORE
from jax_huginn.reporting.record import gini, routing_metrics
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.optimizer import decayed, make_optimizer, make_schedule
from jax_huginn.training.step import init_state, make_train_step

FLOAT64 = {"dtype": "float64", "param_dtype": "float64", "core_layers": 1, "prelude_layers": 0, "coda_layers": 0}


def rows_of(config, mask=False):
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    labels = rows[:, 1:].copy()
    if mask:  # unequally over the micro-batches
        labels[0, 3:] = IGNORE
        labels[3, :9] = IGNORE
    return rows[:, :-1], labels


@pytest.mark.parametrize(("mask", "placement"), [(False, "injection"), (True, "injection"), (False, "core")])
def test_a_step_is_the_mean_gradient_of_its_learnt_tokens_clipped_and_decayed(make_config, mask, placement):
    """Two micro-batches, each with its own depth and s_0, written out by hand in float64."""
    config = make_config(
        model=FLOAT64 | ({"core_layers": 2} if placement == "core" else {}),
        train={"micro_batches": 2, "batch_size": 4, "seed": 5},
        optimizer={"warmup_steps": 0, "clip_norm": 0.3, "weight_decay": 0.2, "learning_rate": 0.01},
        data={"source": "generated" if mask else "stdlib"},
        moe={"placement": placement},
    )
    state = init_state(config)
    tokens, labels = rows_of(config, mask)
    counted_U = (labels != IGNORE).reshape(2, -1).sum(1)
    assert (counted_U[0] < counted_U[1]) == mask
    n_U, k_U = sample_depths(config.recurrence, 5, 0, 2)
    new_state, metrics = jax.jit(make_train_step(config))(state, tokens, labels, n_U, k_U)

    graphdef, _ = abstract_model(config)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective_and_gradient(params, tokens, labels, n, k, s_0, share, earlier_QE):
        output = nnx.merge(graphdef, params).training_loss(tokens, labels, n, k, s_0)
        counts_QE = earlier_QE + output.moe.counts_QE  # balanced over the step so far, not within a micro-batch
        by_router = [
            len(counts_E) * jnp.sum(counts_E / counts_E.sum() * probability_E)
            for counts_E, probability_E in zip(counts_QE, output.moe.probability_QE, strict=True)
        ]
        balance = sum(by_router) / len(by_router) - output.moe.balance_loss
        auxiliary = (output.loss - output.log_ppl + config.moe.balance_weight * balance) / 2
        return auxiliary + output.log_ppl * share, (counts_QE, balance)

    routers = 1 if placement == "injection" else config.model.core_layers
    gradients, losses, counts_QE = [], [], jnp.zeros((routers, config.moe.experts))
    for index in range(2):
        key = jax.random.fold_in(jax.random.key(5), index)
        s_0 = initializers.random_state(key, (2, 64, 32), jnp.dtype("float64"))
        part = slice(2 * index, 2 * index + 2)
        micro_batch = (tokens[part], labels[part], n_U[index], k_U[index], s_0)
        share = counted_U[index] / counted_U.sum()
        (loss, (counts_QE, balance)), gradient = objective_and_gradient(state.params, *micro_batch, share, counts_QE)
        assert counts_QE.shape == (routers, config.moe.experts)
        assert (abs(balance) > 1e-6) == (index > 0)
        gradients.append(gradient)
        losses.append(loss)
    mean = jax.tree.map(lambda a, b: a + b, *gradients)
    norm = optax.tree.norm(mean)
    assert norm > config.optimizer.clip_norm
    assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-10)
    assert float(metrics.objective) == pytest.approx(float(sum(losses)), rel=1e-12)

    def by_hand(path, p, g):
        g = g * 0.3 / norm
        decay = 0.2 if p.ndim >= 2 and path[-1].key != "qk_bias" else 0
        return p - 0.01 * (g / (jnp.abs(g) + 1e-8) + decay * p)  # AdamW's first step: m_hat = g, v_hat = g^2

    expected = jax.tree_util.tree_map_with_path(by_hand, state.params, mean)
    for a, b in zip(jax.tree.leaves(new_state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert int(new_state.step) == 1


def test_weight_decay_spares_norms_and_biases(make_config):
    _, params = abstract_model(make_config())
    spared = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(decayed(params))
        if not leaf
    }
    assert {name.split(".")[-1] for name in spared} == {"weight", "qk_bias"}
    assert "wte" not in spared
    assert "norm_f.weight" in spared


def test_schedules(make_config):
    def curve(**optimizer):
        config = make_config(train={"steps": 100}, optimizer={"learning_rate": 2.0, **optimizer})
        return np.array([float(make_schedule(config)(step)) for step in range(100)])

    trapezoid = curve(warmup_steps=10, cooldown_steps=20)
    np.testing.assert_allclose(trapezoid[:10], 2 * np.arange(1, 11) / 10)
    assert set(trapezoid[9:81]) == {2.0}
    np.testing.assert_allclose(trapezoid[80:], 2 * np.arange(20, 0, -1) / 20)
    cosine = curve(schedule="cosine", warmup_steps=10, final_fraction=0.1)
    assert cosine[10] == 2.0
    assert cosine[55] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert cosine[99] == pytest.approx(0.2, abs=0.01)
    assert curve(warmup_steps=1000).max() == pytest.approx(0.2)  # a short run stays inside its warmup


def test_bfloat16_moments_are_stored_narrow_and_computed_wide(make_config):
    config = make_config(optimizer={"moment_dtype": "bfloat16"})
    params = {"w_fc": jnp.ones((8, 8), jnp.float32)}
    optimizer, reference = make_optimizer(config), make_optimizer(make_config())
    state, reference_state = optimizer.init(params), reference.init(params)
    stored = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert stored == {jnp.dtype("bfloat16")}
    gradients = {"w_fc": jnp.full((8, 8), 0.01, jnp.float32)}
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
        expected, reference_state = reference.update(gradients, reference_state, params)
    np.testing.assert_allclose(updates["w_fc"], expected["w_fc"], rtol=2e-2)


def test_training_learns_a_fixed_batch(make_config):
    config = make_config(train={"micro_batches": 1}, optimizer={"learning_rate": 1e-2, "warmup_steps": 0})
    step = jax.jit(make_train_step(config), donate_argnums=0)
    state, rows = jax.jit(lambda: init_state(config))(), rows_of(config)
    losses = []
    for index in range(15):
        state, metrics = step(state, *rows, *sample_depths(config.recurrence, 0, index, 1))
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(96), abs=0.6)
    assert losses[-1] < losses[0] - 0.5


def test_routing_metrics_by_hand():
    routing = Routing(
        counts_QE=np.array([[6.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]),  # of two routers
        probability_QE=np.array([[0.5, 0.2, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]]),
        first_choice_E=np.array([3.0, 1.0, 0.0, 0.0]),
        entropy=np.array(0.0),
        z_loss=np.array(0.0),
        dropped=np.array(2.0),
    )
    record = routing_metrics(routing)
    assert record["expert_counts"] == [6, 2, 0, 0]
    assert record["load_balance_loss"] == pytest.approx(4 * (6 / 7 * 0.5 + 1 / 7 * 0.2 + 0.4) / 2)
    assert record["expert_utilization"] == 0.5
    assert record["expert_preference"] == [0.75, 0.25, 0, 0]
    assert record["top_expert_usage_pct"] == 75
    assert record["dropped_token_ratio"] == 0.25  # 2 of 8 assignments
    assert record["router_collapse_warning"] is True
    assert record["low_expert_diversity_warning"] is False
    assert record["attention_spread"] == pytest.approx(0.3)
    assert record["attention_variance"] == pytest.approx(0.0125)
    assert (record["expert_0_token_ratio"], record["expert_3_importance"]) == (0.75, 0.1)
    assert record["gini_coefficient"] == pytest.approx(0.625)  # mean absolute difference over twice the mean
    named = {"routing_entropy", "load_balance_loss", "max_expert_attention", "min_expert_attention"}
    assert named <= record.keys()


def test_gini():
    assert gini(np.full(8, 1 / 8)) == pytest.approx(0)
    assert gini(np.eye(8)[0]) == pytest.approx(7 / 8)


def test_flops_of_the_public_shape():
    """25 + 8 recurrences of the dense 3.565 B shape at sequence 4096, counted by hand. The adapter multiplies the state
    in every recurrence and the embedding once."""
    from jax_huginn.config.presets import load_config

    config = load_config("configs/huginn_3_5b.py")
    d, f, s = 5280, 17920, 4096
    block = 2 * (4 * d * d + 3 * d * f) + 2 * s * d
    recurrence, outside = 4 * block + 2 * d * d, 4 * block + 2 * d * d + 2 * 65536 * d
    assert forward_flops(config, s) == (outside, recurrence)
    assert training_flops(config, 25, 8) == 3 * outside + (25 + 24) * recurrence


def test_an_unknown_device_has_no_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
