"""The three optimisers: which weights each one moves, by how much, what it decays and how it keeps its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.cli import parse_config
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import OptimizerConfig
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.parameters import cast_params, group_of
from jax_huginn.model.sharding import specs
from jax_huginn.training.optimizer import decayed, make_optimizer

OPTIMIZERS = ("adamw", "adam_atan2", "muon")
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
RATE = {"learning_rate": 0.01, "warmup_steps": 0, "clip_norm": 1e9}


def draws(seed: int = 0, size: float = 1.0):
    """A tree with a parameter of every group, in float64."""
    generator = np.random.default_rng(seed)
    shapes = {
        "wte": (12, 6),
        "adapter": (12, 6),
        "norm_f": {"weight": (6,)},
        "attn": {"qk_bias": (2, 1, 3, 2)},
        "moe": {"router": (6, 4), "experts": {"w_up": (4, 6, 10), "w_down": (4, 10, 6)}},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(size * generator.standard_normal(shape)), shapes, is_leaf=lambda x: type(x) is tuple
    )


def one_update(config, gradients, params):
    optimizer = make_optimizer(config)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- Groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["injection", "core"])
def test_every_parameter_of_a_model_is_in_the_group_that_its_name_says(make_config, placement):
    _, params = abstract_model(make_config(moe={"placement": placement}))
    groups = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        name = ".".join(names[-2:]) if "experts" in names else names[-1]
        groups.setdefault(group_of(path), set()).add(name)
    assert groups == {
        "embedding": {"wte"},
        "router": {"router"},
        "matrix": {"adapter", "w_qkv", "w_out", "w_fc", "w_proj", "w_gate", "w_up", "w_down"},
        "expert stack": {"experts.w_gate", "experts.w_up", "experts.w_down"},
        "vector": {"weight", "qk_bias"},
    }


def test_a_parameter_that_the_table_does_not_name_is_refused_everywhere():
    params = {"moe": {"gain": jnp.zeros(3)}}
    for ask in (decayed, specs, lambda params: cast_params(params, "bfloat16")):
        with pytest.raises(KeyError, match="'gain' is missing from the table"):
            ask(params)


# ---- Decay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight_decay", "lost"),
    [
        ("adamw", None, 0.1 * 0.01 / 4),
        ("muon", None, 0.1 * 0.01 / 4),
        ("adam_atan2", None, 1e-4 / 4),  # of the warmup's four steps this is the first
        ("adamw", 0.3, 0.3 * 0.01 / 4),
        ("adam_atan2", 0.003, 0.003 / 4),
    ],
)
def test_without_gradients_matrices_lose_a_documented_share_and_vectors_nothing(make_config, name, weight_decay, lost):
    config = make_config(optimizer={**RATE, "name": name, "weight_decay": weight_decay, "warmup_steps": 4})
    params = draws()
    updates = flat(one_update(config, jax.tree.map(jnp.zeros_like, params), params))
    for path, weight in flat(params).items():
        share = 0 if path in ("norm_f.weight", "attn.qk_bias") else lost
        np.testing.assert_allclose(updates[path], -share * weight, rtol=1e-12, atol=1e-18, err_msg=path)


def test_a_decay_of_adamws_size_is_refused_for_adam_atan2():
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay=0\.1 under optimizer\.name=adam_atan2 .* 1e-4"):
        OptimizerConfig(name="adam_atan2", weight_decay=0.1)


@pytest.mark.parametrize("weight_decay", [None, 0.001])
def test_name_and_decay_come_from_the_command_line_and_go_through_json(weight_decay):
    arguments = ["--config", "configs/moe.py", "--optimizer.name", "adam_atan2"]
    config = parse_config(arguments + ([] if weight_decay is None else ["--optimizer.weight-decay", "0.001"]))
    assert config.optimizer.decay == (weight_decay or 1e-4)
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ConfigError, match="lion"):
        parse_config([*arguments[:-1], "lion"])


# ---- Adam-atan2 ---------------------------------------------------------------------------------------------------


def by_hand(gradients, rate):
    """The update of every step of one tensor, in NumPy, with b1 0.9 and b2 0.95."""
    m, v = gradients[0], gradients[0] ** 2
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, np.maximum(0.95 * v + 0.05 * g**2, 1e-12)
        clip = max(1.0, float(np.sqrt(np.mean(g**2 / v))))
        yield clip, -rate / clip / (1 - 0.9**t) * np.arctan2(m, np.sqrt(v) / np.sqrt(1 - 0.95**t))


def test_adam_atan2_is_the_public_runs_and_clips_each_expert_by_itself(make_config):
    """Gradients that vanish, then stay small, then jump in one expert only: the floor and the clip are both met."""
    config = make_config(optimizer={**RATE, "name": "adam_atan2", "weight_decay": 0.0})
    optimizer, params = make_optimizer(config), draws()
    steps = [draws(seed, size) for seed, size in enumerate((0.0, 1e-9, 1e-3, 1e-3, 1e-3))]
    steps[-1]["moe"]["experts"]["w_up"] = steps[-1]["moe"]["experts"]["w_up"].at[2].mul(100)
    expected = {
        ("wte", ...): [flat(g)["wte"] for g in steps],
        **{(name, i): [flat(g)[name][i] for g in steps] for name in EXPERTS for i in range(4)},
    }
    expected = {tensor: list(by_hand(gradients, 0.01)) for tensor, gradients in expected.items()}
    state = optimizer.init(params)
    for step, gradients in enumerate(steps):
        updates, state = optimizer.update(gradients, state, params)
        for (name, part), all_steps in expected.items():
            np.testing.assert_allclose(flat(updates)[name][part], all_steps[step][1], rtol=1e-12, err_msg=name)
    clips = {tensor: round(all_steps[-1][0]) for tensor, all_steps in expected.items()}
    assert clips.pop((EXPERTS[0], 2)) == 4
    assert set(clips.values()) == {3}


EXPERTS = ("moe.experts.w_up", "moe.experts.w_down")


def test_adam_atan2_does_not_see_the_scale_of_gradients(make_config):
    config = make_config(optimizer={**RATE, "name": "adam_atan2"})
    params = draws()
    small, large = (flat(one_update(config, draws(1, size), params)) for size in (1.0, 1e4))
    for name, update in small.items():
        np.testing.assert_allclose(update, large[name], rtol=1e-9)


# ---- Muon ---------------------------------------------------------------------------------------------------------


def test_muon_makes_each_hidden_matrix_nearly_orthogonal_at_adamws_size(make_config):
    """Each expert by itself, embedding and router not. Five steps bring singular values into 0.6 to 1.3 or so."""
    config = make_config(optimizer={**RATE, "name": "muon", "weight_decay": 0.0})
    updates = flat(one_update(config, draws(1), draws()))
    hidden = {"adapter": updates["adapter"][None], **{name: updates[name] for name in EXPERTS}}
    for name, stack in hidden.items():
        for matrix in stack:
            values = np.linalg.svd(matrix / (0.01 * 0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
            assert 0.5 < values.min() <= values.max() < 1.4, (name, values)
        assert 0.5 < np.sqrt((stack**2).mean()) / (0.01 * 0.2) < 1.4


def test_muon_leaves_embedding_router_norms_and_biases_to_the_very_adamw(make_config):
    """Two steps, so that a Nesterov momentum or another b2 would show."""
    results = []
    for name in ("adamw", "muon"):
        optimizer, params = make_optimizer(make_config(optimizer={**RATE, "name": name})), draws()
        state = optimizer.init(params)
        for seed in (1, 2):
            updates, state = optimizer.update(draws(seed), state, params)
        results.append(flat(updates))
    adamw, muon = results
    same = {name for name in adamw if np.array_equal(adamw[name], muon[name])}
    assert same == {"wte", "moe.router", "norm_f.weight", "attn.qk_bias"}


def test_muon_treats_a_stack_as_its_experts_one_by_one(make_config):
    config = make_config(optimizer={**RATE, "name": "muon"})
    params, gradients = draws()["moe"], draws(1)["moe"]
    stacked = flat(one_update(config, gradients, params))
    for expert in range(4):
        alone = [{"experts": jax.tree.map(lambda x: x[expert], tree["experts"])} for tree in (gradients, params)]  # noqa: B023
        updates = flat(one_update(config, *alone))
        for name, update in updates.items():
            np.testing.assert_allclose(update, stacked[name][expert], rtol=1e-10)


# ---- State --------------------------------------------------------------------------------------------------------


@each_optimizer
def test_moments_are_kept_narrow_computed_wide_and_cost_the_stated_bytes(make_config, name):
    """Two moments a parameter, one for Muon's matrices; counters and Muon's coefficients are no moments."""
    wide = make_config(optimizer={**RATE, "name": name})
    narrow = make_config(optimizer={**RATE, "name": name, "moment_dtype": "bfloat16"})
    params = jax.tree.map(lambda x: x.astype(jnp.float32), draws())
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32), draws(1, 0.01))
    updates = {}
    for config in (wide, narrow):
        optimizer = make_optimizer(config)
        state = optimizer.init(params)
        before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        for _ in range(3):
            updates[config.optimizer.moment_dtype], state = optimizer.update(gradients, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        moments = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape != (3,)]
        assert {str(x.dtype) for x in moments} == {config.optimizer.moment_dtype}
        all_, in_muon = (sum(x.size for x in jax.tree.leaves(params)), 12 * 6 + 2 * 4 * 6 * 10)
        assert sum(x.size for x in moments) == 2 * all_ - (in_muon if name == "muon" else 0)
        coefficients = [x for x in jax.tree.leaves(state) if x.shape == (3,)]
        for x in coefficients:
            np.testing.assert_allclose(x, [3.4445, -4.7750, 2.0315], rtol=1e-6)
    for path, update in flat(updates["bfloat16"]).items():
        error = np.linalg.norm(update - flat(updates["float32"])[path]) / np.linalg.norm(update)
        assert 0 < error < 0.02, path


@each_optimizer
def test_each_optimizer_learns_a_small_problem(make_config, name):
    """A linear map from data, through the optimiser alone: the error falls by ten at the same settings."""
    settings = {**RATE, "name": name, "learning_rate": 0.1, "weight_decay": 0.0, "cooldown_steps": 200}
    config = make_config(optimizer=settings, train={"steps": 300})
    x, target = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in ((0, (64, 8)), (1, (8, 8))))
    optimizer, params = make_optimizer(config), {"adapter": jnp.zeros((8, 8))}

    def loss(params):
        return jnp.mean((x @ (params["adapter"] - target)) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    state = optimizer.init(params)
    values = []
    for _ in range(300):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0], (values[0], values[-1])


def test_bfloat16_moments_need_a_second_moment_that_can_fall():
    """v decays from 1 to 0.01 after the gradient falls tenfold, stored in bfloat16 at b2 = 0.995; nearer to 1 it does
    not, and is refused."""

    def fallen(b2: float) -> float:
        decay = lambda _, v: (b2 * v.astype(jnp.float32) + (1 - b2) * 0.01).astype(jnp.bfloat16)  # noqa: E731
        return float(jax.lax.fori_loop(0, 20_000, decay, jnp.ones((), jnp.bfloat16))) ** 0.5

    assert fallen(0.999) > 0.9
    assert fallen(0.995) < 0.25
    OptimizerConfig(moment_dtype="bfloat16", b2=0.995)
    OptimizerConfig(b2=0.999)
    for b2 in (0.997, 0.999):
        with pytest.raises(ConfigError, match=rf"moment_dtype=bfloat16 cannot hold .* optimizer.b2={b2}"):
            OptimizerConfig(moment_dtype="bfloat16", b2=b2)
