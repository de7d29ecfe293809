"""Training on 8 devices is training on one, each device holds its part, and checkpoints go from mesh to mesh."""

import math
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jax_huginn.checkpoints.save import Checkpoints
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.config.schema import CheckpointConfig
from jax_huginn.data.rows import IGNORE
from jax_huginn.model.sharding import shardings, specs
from jax_huginn.parallel.mesh import AXES, REPLICATED, per_device
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.optimizer import make_optimizer
from jax_huginn.training.step import abstract_state, init_params, init_state, make_gradient, make_state, make_train_step
from jax_huginn.training.validation import make_validation
from tests.parallel_cases.support import ONE, STEPS, mesh_config, mesh_of, relative

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def rows(config) -> np.ndarray:
    shape = (STEPS, config.train.batch_size, config.train.sequence_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)


def trained(config) -> SimpleNamespace:
    """Five steps: their losses, the last state and metrics. Some labels do not count, unequally over the devices."""
    mesh = mesh_of(config)
    state = make_state(config, mesh)
    step = jax.jit(make_train_step(config, mesh), donate_argnums=0)
    losses, metrics = [], None
    for index, batch in enumerate(rows(config)):
        tokens, labels = batch[:, :-1], batch[:, 1:].copy()
        labels[1, :9] = IGNORE
        depths = sample_depths(config.recurrence, config.train.seed, index, config.train.micro_batches)
        state, metrics = step(state, tokens, labels, *depths)
        losses.append([float(metrics.loss), float(metrics.objective), float(metrics.grad_norm)])
    return SimpleNamespace(config=config, mesh=mesh, state=state, losses=np.array(losses), metrics=metrics)


@cache
def trained_on(sizes: tuple[int, int, int], dtype: str) -> SimpleNamespace:
    """In float32, which adds its rounding alone, by one gradient path: full remat compiles no second one."""
    return trained(mesh_config(sizes, dtype, compute={"remat": "full" if dtype == "float32" else "none"}))


def require_equal(one: SimpleNamespace, many: SimpleNamespace, tolerance: float) -> None:
    np.testing.assert_allclose(many.losses, one.losses, rtol=tolerance)
    # The first moments are a sum of the five steps' gradients; an update of Adam's would blow up their rounding.
    for name in ("mu", "params"):
        pairs = zip(leaves_under(one.state, name), leaves_under(many.state, name), strict=True)
        for (path, a), (_, b) in pairs:
            allowed = tolerance if name == "mu" else 100 * tolerance
            assert relative(a, b) < allowed, f"{path} is {relative(a, b):.1e} off"
    for a, b in zip(jax.tree.leaves(one.metrics), jax.tree.leaves(many.metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)


def leaves_under(state: Any, name: str) -> list[tuple[str, jax.Array]]:
    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    found = [(path, leaf) for path, leaf in found if f".{name}" in path and leaf.ndim]
    assert len(found) > 10
    return found


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [*((sizes, "float64", 1e-10) for sizes in MESHES), ((2, 2, 2), "float32", 1e-5)],
)
def test_five_steps_on_a_mesh_are_those_of_one_device(sizes, dtype, tolerance):
    require_equal(trained_on(ONE, dtype), trained_on(sizes, dtype), tolerance)


def test_five_steps_with_routed_core_blocks_and_masked_labels():
    """Placement "core" routes anew in every recurrence, inside of the loop and of the depth's cond."""
    sections = {
        "moe": {"experts": 4, "placement": "core"},
        "model": {"prelude_layers": 0},
        "compute": {"remat": "full"},
        "data": {"source": "generated"},
    }
    one, many = (trained(mesh_config(sizes, **sections)) for sizes in (ONE, (1, 2, 4)))
    require_equal(one, many, 1e-10)


def test_held_out_loss_and_accuracy_are_those_of_one_device():
    losses = []
    for sizes in (ONE, (2, 2, 2)):
        run = trained_on(sizes, "float64")
        batch = rows(run.config)[0][:8]
        batches = [{"tokens": batch[:, :-1], "labels": np.where(batch[:, 1:] < 30, IGNORE, batch[:, 1:])}]
        batches[0]["groups"] = (batches[0]["labels"] % 3 + 1) * (batches[0]["labels"] != IGNORE)
        losses.append(make_validation(run.config, batches, None, run.mesh)(run.state.params))
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-12)
    assert 0 < losses[0]["val_accuracy_r4"] < 0.5


# ---- What a device holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (1, 2, 4)], ids=str)
def test_no_device_holds_more_than_its_part(sizes):
    """Bytes on each device of weights and moments that live, after five steps: an eighth, and the norms and biases."""
    if sizes == (1, 2, 4):
        config = mesh_config(sizes)
        state = make_state(config, mesh_of(config))  # as initialised
    else:
        state = trained_on(sizes, "float64").state
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.is_fully_replicated)
    assert whole < 0.02 * total
    assert set(held.values()) == {(total - whole) // 8 + whole}


@pytest.mark.parametrize("optimizer", ["adamw", "adam_atan2", "muon"])
@pytest.mark.parametrize("placement", ["injection", "core"])
def test_every_optimizers_state_is_split_like_its_weights(optimizer, placement):
    sections = {"optimizer": {"name": optimizer, "moment_dtype": "bfloat16"}, "moe": {"experts": 8}}
    config = mesh_config((1, 8, 1), "float32", **sections | {"moe": {"placement": placement}})
    state = jax.eval_shape(lambda: init_state(config))
    where = shardings(state, mesh_of(config))
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(where), strict=True):
        if leaf.size > 256:
            assert math.prod(sharding.shard_shape(leaf.shape)) == leaf.size // 8, jax.tree_util.keystr(path)


@pytest.mark.parametrize("optimizer", ["adam_atan2", "muon"])  # adamw took the five steps
def test_an_update_on_a_mesh_is_that_of_one_device(optimizer):
    """The compiler splits the update: norms, clipping per tensor and Muon's products go over all parts of a matrix."""
    config = mesh_config((2, 2, 2), optimizer={"name": optimizer})
    mesh, update = mesh_of(config), make_optimizer(config).update
    random = np.random.default_rng(0)
    params = jax.eval_shape(lambda: init_params(config))
    params, gradients = (jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params) for _ in range(2))
    inputs = (gradients, jax.jit(make_optimizer(config).init)(params), params)
    split = jax.tree.map(lambda leaf, where: jax.device_put(np.asarray(leaf), where), inputs, shardings(inputs, mesh))
    for a, b in zip(jax.tree.leaves(jax.jit(update)(*inputs)), jax.tree.leaves(jax.jit(update)(*split)), strict=True):
        assert relative(a, b) < 1e-10


def abstract_gradient(sizes, **sections):
    config = mesh_config(sizes, "float32", **sections)
    params = jax.eval_shape(lambda: init_params(config))
    batch = config.train.batch_size // config.train.micro_batches, config.train.sequence_length
    micro_batches = config.train.micro_batches
    tokens = jax.ShapeDtypeStruct((micro_batches, *batch), np.int32)
    number = jax.ShapeDtypeStruct((micro_batches,), np.int32)
    split, in_order = specs(params), PartitionSpec(None, AXES)
    in_specs = (split, in_order, in_order, REPLICATED, REPLICATED, REPLICATED)
    run = per_device(make_gradient(config), mesh_of(config), in_specs, (split, REPLICATED, REPLICATED))
    return run, (params, tokens, tokens, number, number, number)


def test_the_cores_weights_and_gradients_travel_once():
    """No collective is inside a recurrence: no gather of weights, no sum of gradients over the devices."""
    run, arguments = abstract_gradient((2, 2, 2), train={"micro_batches": 1, "batch_size": 8})
    jaxpr = jax.make_jaxpr(run)(*arguments)
    seen = set(exchanges(jaxpr.jaxpr, inside_loop=False))
    assert {name for name, _ in seen} >= {"all_gather", "reduce_scatter"}
    assert not [name for name, inside_loop in seen if inside_loop]


def exchanges(jaxpr, inside_loop: bool):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("all_gather", "reduce_scatter", "psum", "psum_invariant", "all_to_all", "ppermute"):
            yield name, inside_loop
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from exchanges(inner, inside_loop or name in ("scan", "while"))


def test_the_compiled_step_never_holds_a_whole_state():
    """What the compiler plans for one of 8 devices, gathered weights and their gradients included, is less than one
    copy of weights and moments; and gradients travel by reduce-scatter, only vectors and statistics by all-reduce."""
    model = {"width": 256, "mlp_width": 1024, "prelude_layers": 4}
    sections = {
        "model": model,
        "compute": {"remat": "full"},
        "moe": {"experts": 0},
        "train": {"micro_batches": 1, "batch_size": 8},
    }
    config = mesh_config((1, 8, 1), "float32", **sections)
    mesh = mesh_of(config)
    state = jax.eval_shape(lambda: init_state(config))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, shardings(state, mesh)
    )
    tokens, number = jax.ShapeDtypeStruct((8, 16), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
    step = jax.jit(make_train_step(config, mesh), donate_argnums=0)
    compiled = step.lower(placed, tokens, tokens, number, number).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 1.02 * total / 8
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.8 * total
    sizes = {"all-reduce": [], "reduce-scatter": [], "all-gather": []}
    for result, operation in re.findall(r"= (.+?) (all-reduce|reduce-scatter|all-gather)\(", compiled.as_text()):
        sizes[operation] += [
            math.prod(int(axis) for axis in shape.split(",") if axis) for shape in re.findall(r"\w\[([\d,]*)\]", result)
        ]
    assert max(sizes["all-reduce"]) <= 2 * 256  # a qk_bias
    matrices = sum(leaf.ndim == 2 for leaf in jax.tree.leaves(state.params))
    assert len(sizes["reduce-scatter"]) == matrices + 1  # the tied embedding's twice
    assert len(sizes["all-gather"]) >= matrices


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [((2, 2, 2), ONE), ((8, 1, 1), (2, 2, 2)), (ONE, (1, 8, 1))], ids=str)
def test_a_checkpoint_of_one_mesh_restores_on_another(source, target, tmp_path):
    run = trained_on(source, "float64")
    whole = {"order": {}, "rows": 40, "streams": [[1] * 6], "skipped": [[0] * 4]}
    part = whole | {"process": [0, 1]}
    position = SimpleNamespace(get_state=lambda: part, set_state=lambda state: seen.append(state))
    checkpoints, seen = Checkpoints(tmp_path, CheckpointConfig()), []
    checkpoints.save(run.state, position, run.config)
    config = mesh_config(target)
    mesh = mesh_of(config)
    state = checkpoints.restore(abstract_state(config, mesh), position)
    checkpoints.close()
    assert seen == [whole]
    where = jax.tree.leaves(shardings(state, mesh))
    for (path, a), b, sharding in zip(
        jax.tree_util.tree_leaves_with_path(run.state), jax.tree.leaves(state), where, strict=True
    ):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)
        assert b.sharding.is_equivalent_to(sharding, b.ndim), jax.tree_util.keystr(path)
    loaded = jax.tree.leaves(nnx.as_pure(nnx.split(load_checkpoint(tmp_path))[1]))
    assert all(np.array_equal(a, b) for a, b in zip(loaded, jax.tree.leaves(run.state.params), strict=True))
