"""The comparison sees: every plausible mistake, made on one side, is caught, far above the tolerance.

Each mistake changes the Torch model only. What is asserted is the very comparison of test_model_parity.py.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from parity_tests.layers import RouterSpy, first_layer_off
from parity_tests.support import (
    Batch,
    Pair,
    Tensors,
    differences_of_run,
    make_batch,
    make_pair,
    relative_error,
    run_jax,
    run_torch,
    torch_forward,
    torch_step,
)
from torch_reference import MoEHuginnModel
from torch_reference import layers as twin_layers

CAUGHT = 1e-3
"""Least relative error of the worst tensor: 10^6 times the widest tolerance of float64, 10 times float32's."""
DEPTH = (3, 2)

Mutation = Callable[[MoEHuginnModel], None]


@functools.cache
def healthy(kind: str) -> tuple[Pair, Batch, Tensors]:
    pair = make_pair(kind)
    batch = make_batch(pair.config)
    return pair, batch, run_jax(pair, batch, *DEPTH)


def worst_error(kind: str, mutate: Mutation) -> float:
    """The largest finite error that the comparison reports against a mutated Torch model."""
    pair, batch, ours = healthy(kind)
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        mutate(twin)
    differences = differences_of_run(ours, run_torch(twin, batch, *DEPTH), pair.dtype)
    return max((x.error for x in differences if math.isfinite(x.error)), default=0.0)


# ---- Mistakes in the weights --------------------------------------------------------------------------------------


def swap(a: str, b: str) -> Mutation:
    def mutate(twin: MoEHuginnModel) -> None:
        first, second = twin.get_parameter(a), twin.get_parameter(b)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)

    return mutate


def halves(name: str, dim: int = 0) -> Mutation:
    """Swap the halves of a weight."""
    return lambda twin: twin.get_parameter(name).copy_(torch.cat(twin.get_parameter(name).chunk(2, dim)[::-1], dim))


def q_and_k(twin: MoEHuginnModel) -> None:
    weight = twin.get_parameter(CORE + "attn.Wqkv.weight")
    q, k, v = weight.chunk(3)
    weight.copy_(torch.cat([k, q, v]))


CORE = "transformer.core_block.0."
MOE = "transformer.moe."
IN_WEIGHTS = {
    "norm_1 and norm_2 swapped": ("dense", swap(CORE + "norm_1.weight", CORE + "norm_2.weight")),
    "norm_3 and norm_4 swapped": ("dense", swap(CORE + "norm_3.weight", CORE + "norm_4.weight")),
    "norm_2 and norm_3 swapped": ("dense", swap(CORE + "norm_2.weight", CORE + "norm_3.weight")),
    "final norm and MoE norm swapped": ("injection", swap("transformer.ln_f.weight", "transformer.moe_norm.weight")),
    "norms of prelude and coda swapped": (
        "dense", swap("transformer.prelude.0.norm_4.weight", "transformer.coda.0.norm_4.weight"),
    ),
    "core blocks in the wrong order": ("dense", swap(CORE + "mlp.fc.weight", "transformer.core_block.1.mlp.fc.weight")),
    "qk_bias of q and k flipped": ("dense", halves(CORE + "attn.qk_bias")),
    "qk_bias missing": ("dense", lambda twin: twin.get_parameter(CORE + "attn.qk_bias").zero_()),
    "q and k swapped in Wqkv": ("dense", q_and_k),
    "gate and up swapped in the MLP": ("dense", halves(CORE + "mlp.fc.weight")),
    "gate and up swapped in an expert": (
        "injection", swap(MOE + "specialized_experts.1.w_gate.weight", MOE + "specialized_experts.1.w_up.weight"),
    ),
    "gate and up swapped in the shared expert": (
        "core", swap(CORE + "moe.shared_expert.w_gate.weight", CORE + "moe.shared_expert.w_up.weight"),
    ),
    "two experts swapped": (
        "injection", swap(MOE + "specialized_experts.0.w_down.weight", MOE + "specialized_experts.3.w_down.weight"),
    ),
    "adapter halves swapped": ("dense", halves("transformer.adapter.weight", dim=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_WEIGHTS)
def test_a_mistake_in_the_weights_is_caught(name):
    kind, mutate = IN_WEIGHTS[name]
    error = worst_error(kind, mutate)
    assert error > CAUGHT, f"{name}: the comparison sees {error:.1e} only"


def test_init_weights_would_hide_such_mistakes():
    """Why parity weights are not init weights: there, swapped norms and a flipped qk_bias change nothing at all."""
    pair, batch, _ = healthy("dense")
    twin = MoEHuginnModel(pair.twin.config).double()
    before = torch_forward(twin, batch, *DEPTH).logits
    with torch.no_grad():
        for name in ("norm_1 and norm_2 swapped", "norm_3 and norm_4 swapped", "qk_bias of q and k flipped"):
            IN_WEIGHTS[name][1](twin)
    assert torch.equal(torch_forward(twin, batch, *DEPTH).logits, before)


# ---- Mistakes in the code -----------------------------------------------------------------------------------------


def rope_by_halves(x_BSHK: Tensor, base: float) -> Tensor:
    """The pairs (i, i + K/2) of GPT-NeoX, not (2i, 2i + 1)."""
    cos, sin = twin_layers.rope_tables(x_BSHK.shape[1], x_BSHK.shape[3], base, x_BSHK.device)
    first, second = x_BSHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_backwards(x_BSHK: Tensor, base: float) -> Tensor:
    return right_rope(x_BSHK.flip(1), base).flip(1)


def hooked(name: str, hook: Callable[[Tensor, Tensor], Tensor]) -> Mutation:
    """Replace what a layer returns by `hook(input, output)`."""

    def mutate(twin: MoEHuginnModel) -> None:
        twin.get_submodule(name).register_forward_hook(lambda _, x, y: hook(x[0], y))

    return mutate


def embedding_first(twin: MoEHuginnModel) -> None:
    adapter = twin.get_submodule("transformer.adapter")
    adapter.register_forward_pre_hook(lambda _, x: torch.cat(x[0].chunk(2, dim=-1)[::-1], dim=-1))


def final_norm_used_once(twin: MoEHuginnModel) -> None:
    """The second use, behind the coda, is missing."""
    calls = []
    hook = hooked("transformer.ln_f", lambda x, y: calls.append(x) or (y if len(calls) % 2 else x))
    hook(twin)


right_rope = twin_layers.apply_rope
IN_CODE = {
    "embedding scale missing": ("dense", hooked("transformer.wte", lambda x, y: y / 32**0.5)),
    "the embedding is concatenated before the state": ("dense", embedding_first),
    "final norm used once": ("dense", final_norm_used_once),
    "MoE norm missing": ("injection", hooked("transformer.moe_norm", lambda x, y: x + 0 * y)),
    "norm_4 missing": ("dense", hooked(CORE + "norm_4", lambda x, y: x + 0 * y)),
    "MLP without its residual": ("dense", hooked(CORE + "mlp", lambda x, y: y - x)),
}


@pytest.mark.parametrize("name", IN_CODE)
def test_a_mistake_in_the_wiring_is_caught(name):
    kind, mutate = IN_CODE[name]
    error = worst_error(kind, mutate)
    assert error > CAUGHT, f"{name}: the comparison sees {error:.1e} only"


@pytest.mark.parametrize(
    "wrong", [rope_by_halves, rope_backwards, lambda x, base: right_rope(x, 10_000.0), lambda x, base: x],
    ids=["pairs by halves", "positions backwards", "base 10 000", "none"],
)  # fmt: skip
def test_a_mistake_in_rope_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(twin_layers, "apply_rope", wrong)
    assert worst_error("dense", lambda twin: None) > CAUGHT


def test_key_heads_repeated_in_the_wrong_order_are_caught(monkeypatch):
    """Query head h reads key head h modulo G, where it should read h // (H / G)."""
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, times, dim: torch.cat([x] * times, dim))
    assert worst_error("grouped", lambda twin: None) > CAUGHT


@pytest.mark.parametrize("kind", ["injection", "core"])
def test_expert_weights_in_the_wrong_order_are_caught(kind):
    """Each token visits the right experts, but the second choice gets the first one's weight."""
    with RouterSpy(flip_weights=True):
        assert worst_error(kind, lambda twin: None) > CAUGHT


@contextmanager
def changed(twin: MoEHuginnModel, **fields: object) -> Iterator[None]:
    """Change a frozen config for a moment."""
    kept = {name: getattr(twin.config, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(twin.config, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            object.__setattr__(twin.config, name, value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("injection", "balance_weight", 0.0), ("injection", "z_weight", 0.0), ("residual", "moe_residual", False)],
)
def test_a_missing_auxiliary_loss_or_residual_is_caught(kind, field, value):
    pair, _, _ = healthy(kind)
    with changed(pair.twin, **{field: value}):
        assert worst_error(kind, lambda twin: None) > CAUGHT


def test_gradients_that_are_not_truncated_are_caught_though_all_values_agree():
    pair, batch, ours = healthy("dense")
    theirs = run_torch(pair.twin, batch, *DEPTH)
    output, gradients = torch_step(pair.twin, batch, 0, sum(DEPTH))
    assert relative_error(ours["training loss"], output.loss.detach().numpy()) < 1e-10
    differences = differences_of_run(ours, theirs | gradients, pair.dtype)
    assert max(difference.error for difference in differences) > CAUGHT


def test_a_difference_is_reported_with_the_first_tensor_first():
    """Swapped norms of the second core block: no earlier layer is named, and this one is the first to be."""
    pair, batch, _ = healthy("dense")
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        swap("transformer.core_block.1.norm_2.weight", "transformer.core_block.1.norm_3.weight")(twin)
    broken = Pair(pair.config, pair.graphdef, pair.params, twin)
    assert "transformer.core_block.1.norm_2, call 1: off by" in first_layer_off(broken, batch, (1, 1), 1e-10)
