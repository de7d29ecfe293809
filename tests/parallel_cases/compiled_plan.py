"""The plan's bytes against the compiler's on 8 devices; `tests/test_plan.py` runs it in a process of its own.

XLA for CPUs removes the barriers of `jax.checkpoint` and then merges recomputed values with kept ones, so remat would
save nothing; the pass that removes them is turned off. Arithmetic is float32, since CPUs widen bfloat16.
"""

import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_huginn.cost.memory import device_memory, state_arrays
from jax_huginn.cost.roofline import step_exchanges
from jax_huginn.cost.xla import lower_step
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.sharding import specs
from jax_huginn.parallel.mesh import AXES, REPLICATED, per_device
from jax_huginn.training.step import init_params, make_gradient
from tests.parallel_cases.support import mesh_config, mesh_of

MEASURED = 0.10  # relative distance of the plan from the compiler that is allowed


def plan_config(sizes, remat="full", k=4, per_device=1, length=256, **sections):
    """Two wide heads, whose (S,S) scores are small, and weights and activations of the same order."""
    model = {"width": 256, "heads": 2, "kv_heads": 2, "mlp_width": 768, "coda_layers": 1, "max_length": 1024}
    model |= {"vocab_size": 512}
    defaults: dict[str, dict] = {
        "model": model,
        "compute": {"loss_chunk": 64, "attention": "xla", "remat": remat, "unroll": True},
        "moe": {"experts": 8, "active": 2, "width": 96},
        "recurrence": {"mean": 8, "backprop_depth": k},
        "train": {"batch_size": 8 * per_device, "micro_batches": 1, "sequence_length": length},
    }
    for name, fields in sections.items():
        defaults[name] = defaults.get(name, {}) | fields
    return mesh_config(sizes, "float32", **defaults)


@cache
def compiled(*arguments):
    config = plan_config(*arguments)
    return lower_step(config, mesh_of(config)).compile()


def planned(*arguments):
    config = plan_config(*arguments)
    return device_memory(config, arguments[0], state_arrays(config), fused_attention=False)


def temporaries(*arguments) -> tuple[int, int]:
    """(planned, compiled). XLA for CPUs holds a step's gradient of the core beside the sum that it is added to. XLA for
    GPUs does not (docs/scaling.md), so the plan leaves it out."""
    config = plan_config(*arguments)
    beside = state_arrays(config).core_gradient if config.compute.remat == "full" else 0
    return planned(*arguments).temporaries + beside, compiled(*arguments).memory_analysis().temp_size_in_bytes


FULL, TWICE = ((2, 2, 2), "full", 4, 2), ((2, 2, 2), "full", 4, 4)
DOTS, DEEPER = ((1, 8, 1), "dots", 2, 1, 1024), ((1, 8, 1), "dots", 4, 1, 1024)
NONE = ((1, 8, 1), "none", 4, 1, 512)


@pytest.mark.parametrize("case", [FULL, TWICE, DOTS, DEEPER, NONE], ids=str)
def test_arguments_and_temporaries_are_the_compilers(case):
    assert planned(*case).arguments == compiled(*case).memory_analysis().argument_size_in_bytes
    ours, theirs = temporaries(*case)
    print(case, ours, theirs, ours / theirs)
    assert ours == pytest.approx(theirs, rel=MEASURED)


@pytest.mark.parametrize(("less", "more"), [(FULL, TWICE), (DOTS, DEEPER)], ids=["sequences", "recurrences"])
def test_what_one_knob_adds_is_what_it_adds_in_the_compiled_step(less, more):
    (ours, theirs), (ours_more, theirs_more) = temporaries(*less), temporaries(*more)
    print(less, ours_more - ours, theirs_more - theirs, (ours_more - ours) / (theirs_more - theirs))
    assert ours_more - ours == pytest.approx(theirs_more - theirs, rel=MEASURED)


# ---- Exchanges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FULL], ids=str)
def test_the_compiled_steps_exchanges_are_the_plans(case):
    """Results and operands of every collective, by kind. The compiler joins the embedding's two gathers into one."""
    config = plan_config(*case)
    state = state_arrays(config)
    expected = Counter()
    for exchange in step_exchanges(config, case[0], state, n=4):
        expected[exchange.kind] += exchange.size
    expected["all_gather"] -= sum(array.bytes for array in state.copies if array.names[0] == "wte")
    found = Counter()
    line = r"= (.+?) (all-reduce|reduce-scatter|all-gather|all-to-all)\(.*?replica_groups=(\S+)"
    for result, kind, groups in re.findall(line, compiled(*case).as_text()):
        # The text gives a scatter's result; its operand is as many of these as its group has members.
        members = groups.split("}")[0].count(",") + 1 if kind == "reduce-scatter" else 1
        found[kind.replace("-", "_")] += members * sum(
            4 * int(np.prod([int(axis) for axis in shape.split(",") if axis]))
            for shape in re.findall(r"f32\[([\d,]*)\]", result)
        )
    print(case, expected, found)
    assert set(found) == set(expected)
    for kind, size in expected.items():
        assert size == pytest.approx(found[kind], rel=MEASURED), kind


N = 4  # recurrences without gradient: the program does not contain the length of this loop
MESHES = {
    "fsdp": ((1, 8, 1), {}),
    "expert": ((1, 1, 8), {}),
    "data": ((8, 1, 1), {}),
    "mixed, two micro-batches": ((2, 2, 2), {"train": {"batch_size": 16, "micro_batches": 2}}),
    "bfloat16, dots": ((2, 2, 2), {"model": {"dtype": "bfloat16"}, "compute": {"remat": "dots"}}),
    "no remat": ((1, 2, 4), {"compute": {"remat": "none"}}),
    "all_to_all": ((1, 2, 4), {"parallel": {"dispatch": "all_to_all"}}),
    "routed core": ((1, 2, 4), {"moe": {"placement": "core"}}),
    "dense": ((2, 4, 1), {"moe": {"experts": 0}}),
}


@pytest.mark.parametrize("name", MESHES)
def test_the_traced_steps_exchanges_are_the_plans(name):
    """Bytes by kind and axes in one device's program as it is traced, except for sums of a few kilobytes."""
    sizes, sections = MESHES[name]
    config = plan_config(sizes, length=64, **sections)
    expected, found = Counter(), Counter()
    for exchange in step_exchanges(config, sizes, state_arrays(config), N):
        expected[exchange.kind, exchange.axes] += exchange.size
    for key, size in exchanges(traced(config), 1):
        found[key] += size
    for key in expected | found:
        assert expected[key] == pytest.approx(found[key], rel=1e-6, abs=8192), key
    assert max(found.values()) > 1e6


def traced(config):
    params = jax.eval_shape(lambda: cast_params(init_params(config), config.model.dtype))
    train = config.train
    shape = (train.micro_batches, train.batch_size // train.micro_batches, train.sequence_length)
    tokens, number = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct((train.micro_batches,), np.int32)
    split, in_order = specs(params), PartitionSpec(None, AXES)
    in_specs = (split, in_order, in_order, REPLICATED, REPLICATED, REPLICATED)
    run = per_device(make_gradient(config), mesh_of(config), in_specs, (split, REPLICATED, REPLICATED))
    return jax.make_jaxpr(run)(params, tokens, tokens, number, number, number).jaxpr


KINDS = {name: name for name in ("all_gather", "reduce_scatter", "all_to_all")}
KINDS |= {"psum": "all_reduce", "psum_invariant": "all_reduce"}


def exchanges(jaxpr: Any, times: int):
    """((kind, axes), bytes of the whole arrays) of every collective, counted as often as its loop runs. Of a `cond`
    the last branch counts, which is the usual k."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in KINDS:
            axes = params.get("axis_name", params.get("axes"))
            arrays = equation.outvars if name == "all_gather" else equation.invars
            size = sum(array.aval.size * array.aval.dtype.itemsize for array in arrays)
            yield (KINDS[name], (axes,) if isinstance(axes, str) else tuple(axes)), times * size
        runs = times * {"scan": params.get("length", 1), "while": N}.get(name, 1)
        parts = [params["branches"][-1]] if name == "cond" else params.values()
        for part in parts:
            for inner in part if isinstance(part, (tuple, list)) else (part,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from exchanges(inner, runs)
