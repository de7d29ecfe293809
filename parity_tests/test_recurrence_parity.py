"""The recurrence: truncated gradients, long sequences, the initial state, and rounding at greater depth.

Rounding is amplified by the recurrence, so float32 at n + k = 32 and bfloat16 at any depth are held to the float64
result of the same weights: the distance of either framework is at most 1.5 times the other's plus 1e-6.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_huginn.model.initializers import fixed_state
from jax_huginn.model.moe import route
from parity_tests.layers import RouterSpy, jax_router_choosing
from parity_tests.support import (
    GRADIENTS,
    KINDS,
    LARGEST,
    VALUES,
    Batch,
    Pair,
    Tensors,
    check,
    jit,
    make_batch,
    make_pair,
    pair_of,
    relative_error,
    run_jax,
    split,
    torch_forward,
    torch_step,
    values_of,
)
from tests.support import small_config
from torch_reference.initial_state import initial_state

DEEP = 32


@pytest.mark.parametrize("kind", ["dense", "core"])
def test_truncated_gradient_is_that_of_a_torch_loop_under_no_grad(kind):
    """n steps under `torch.no_grad()`, then k steps from the state that they reached, taken as a constant."""
    pair = make_pair(kind)
    batch = make_batch(pair.config)
    _, ours = split(run_jax(pair, batch, 3, 2))
    state = torch.from_numpy(batch.state).double()
    with torch.no_grad():
        e = pair.twin.transformer["wte"](torch.from_numpy(batch.tokens)) * 32**0.5
        for block in pair.twin.transformer["prelude"]:
            e, _ = block(e)
        for _ in range(3):
            x = pair.twin.transformer["adapter"](torch.cat([state, e], dim=-1))
            for block in pair.twin.transformer["core_block"]:
                x, _ = block(x)
            state = x
    _, theirs = torch_step(pair.twin, Batch(batch.tokens, batch.labels, state.numpy()), 0, 2)
    check(ours, theirs, GRADIENTS["float64"], "gradients, float64")


@pytest.mark.parametrize("kind", ["dense", "core"])
def test_truncated_gradient_differs_from_full_backpropagation(kind):
    """By more than a hundredth in every tensor of prelude, adapter and core, so that parity above means something."""
    pair = make_pair(kind)
    batch = make_batch(pair.config)
    _, truncated = split(run_jax(pair, batch, 3, 2))
    _, full = torch_step(pair.twin, batch, 0, 5)
    shared = ("wte", "prelude", "adapter", "core_block")
    errors = {name: relative_error(truncated[name], full[name]) for name in full if name.split(".")[1] in shared}
    assert min(errors.values()) > 1e-2, min(errors.items(), key=lambda item: item[1])


def test_a_sequence_of_1100_tokens_agrees():
    config = small_config(
        model={"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16, "max_length": 1100, "core_layers": 1,
               "dtype": "float64", "param_dtype": "float64"},
        moe={"width": 8},
    )  # fmt: skip
    pair = pair_of(config)
    batch = make_batch(config, rows=1, length=1100)
    ours = pair.forward(1)(batch.tokens, batch.labels, np.int32(2), jnp.asarray(batch.state, "float64"))
    check(values_of(ours), values_of(torch_forward(pair.twin, batch, 2, 1)), VALUES["float64"], "values, float64")


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize(("start", "length", "width"), [(0, 1, 32), (0, 300, 32), (127, 2, 7), (4000, 96, 64)])
def test_initial_state_is_the_same_bit_for_bit(seed, start, length, width):
    ours, theirs = fixed_state(seed, length, width, start), initial_state(seed, length, width, start)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.tobytes() == theirs.tobytes()


# ---- Rounding ---------------------------------------------------------------------------------------------------


@functools.cache
def rounding_pairs(kind: str, dtype: str) -> tuple[Pair, Pair]:
    """A pair in `dtype` and one in float64 of exactly the same weights, which bfloat16 can hold where it is used."""
    sections = {name: dict(fields) for name, fields in KINDS[kind].items()}
    pairs = []
    for name, param_dtype in ((dtype, "float32"), ("float64", "float64")):
        sections["model"] = KINDS[kind].get("model", {}) | {"dtype": name, "param_dtype": param_dtype}
        pairs.append(pair_of(small_config(**sections), bfloat16_weights=dtype == "bfloat16"))
    if dtype == "float32":  # the draws, rounded once, are the weights of both
        rounded = {name: weight.double() for name, weight in pairs[0].twin.state_dict().items()}
        pairs[1].twin.load_state_dict(rounded)
    return pairs[0], pairs[1]


def distances(kind: str, dtype: str, depth: int, batch: Batch) -> tuple[Tensors, Tensors, Tensors]:
    """Values in JAX, in Torch and, in Torch at float64, the result that both should have."""
    pair, exact = rounding_pairs(kind, dtype)
    ours = pair.forward(1)(batch.tokens, batch.labels, np.int32(depth - 1), jnp.asarray(batch.state, dtype))
    twins = (torch_forward(model.twin, batch, depth - 1, 1) for model in (pair, exact))
    return values_of(ours), *map(values_of, twins)


def check_distances(ours: Tensors, theirs: Tensors, exact: Tensors, row: str) -> None:
    """Logits and latents: neither framework strays from float64 by more than 1.5 times the other, plus 1e-6.

    The loss is only reported: in a mean over tokens rounding cancels by luck, so a ratio of two errors says nothing.
    """
    for name in ("latents", "logits", "log_ppl"):
        a, b = relative_error(ours[name], exact[name]), relative_error(theirs[name], exact[name])
        for who, error in (("JAX", a), ("Torch", b)):
            LARGEST[f"to float64, {row}, {name}, {who}"] = (error, "")
        if name != "log_ppl":
            assert a <= 1.5 * b + 1e-6, f"{name}: JAX is {a:.2e} from float64, Torch {b:.2e}"
            assert b <= 1.5 * a + 1e-6, f"{name}: Torch is {b:.2e} from float64, JAX {a:.2e}"


@pytest.mark.parametrize("kind", ["dense", "injection"])
def test_float32_at_32_recurrences_is_as_near_to_float64_as_torch(kind):
    batch = rounding_batch(kind)
    check_distances(*distances(kind, "float32", DEEP, batch), row=f"float32 {kind} n+k={DEEP}")


@pytest.mark.parametrize("depth", [8, DEEP])
def test_bfloat16_of_a_dense_model_is_as_near_to_float64_as_torch(depth):
    check_distances(*distances("dense", "bfloat16", depth, rounding_batch("dense")), row=f"bfloat16 dense n+k={depth}")


@pytest.mark.parametrize("kind", ["injection", "core"])
def test_bfloat16_of_a_moe_whose_choices_are_fixed_is_as_near_to_float64_as_torch(kind):
    """Token t visits experts t and t + 1 (modulo E) at every call, in both frameworks and in the float64 result."""
    batch = rounding_batch(kind)
    token_T = np.arange(batch.tokens.size)
    choice_TA = np.stack([token_T % 4, (token_T + 1) % 4], axis=1)
    rounding_pairs.cache_clear()  # what was compiled with a free choice must not be used here, nor this later
    with jax_router_choosing(choice_TA), RouterSpy(choice_TA):
        ours, theirs, exact = distances(kind, "bfloat16", 8, batch)
    rounding_pairs.cache_clear()
    assert ours["moe.counts_QE"].tolist() == theirs["moe.counts_QE"].tolist()
    check_distances(ours, theirs, exact, row=f"bfloat16 {kind} n+k=8")


def test_bfloat16_reroutes_few_tokens_and_no_more_than_torch():
    """With a free choice, tokens near a tie change experts under bfloat16; they are counted in both frameworks.

    Counted with the MoE at the injection: behind one prelude block, before any recurrence.
    """
    pair, exact = rounding_pairs("injection", "bfloat16")
    batch = rounding_batch("injection")
    chosen = []
    for twin in (pair.twin, exact.twin):
        with RouterSpy() as spy:
            torch_forward(twin, batch, 0, 0)
        chosen.append(np.sort(spy.orders[0][:, :2]))

    def experts(params):
        model = pair.model(params).cast()
        x = model.wte[...][batch.tokens] * 32**0.5
        for block in model.prelude:
            x, *_ = block(x, model.positions(64))
        return route(x.reshape(-1, 32), model.moe.router[...], 2)[0]

    ours = np.sort(np.asarray(jit(experts)(pair.params)))
    counts = [int((x != chosen[1]).any(axis=1).sum()) for x in (ours, chosen[0])]
    tokens = batch.tokens.size
    LARGEST[f"rerouted of {tokens} tokens, bfloat16"] = (counts[0], f"in JAX, {counts[1]} in Torch")
    assert counts[0] <= 0.03 * tokens
    assert counts[0] <= 1.5 * counts[1] + 0.01 * tokens


def rounding_batch(kind: str) -> Batch:
    """More rows than elsewhere, for a steadier measure of rounding; a state that bfloat16 holds exactly."""
    batch = make_batch(small_config(**KINDS[kind]), rows=8)
    return Batch(batch.tokens, batch.labels, np.asarray(jnp.asarray(batch.state, jnp.bfloat16), np.float32))
