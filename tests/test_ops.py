"""The fast paths equal their oracles, in values and gradients, to design tolerances."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.ops.attention import (
    cached_attention,
    cached_attention_oracle,
    causal_attention,
    causal_attention_oracle,
    resolve,
)
from jax_huginn.ops.cross_entropy import IGNORE, cross_entropy, cross_entropy_oracle
from jax_huginn.ops.grouped_mlp import grouped_mlp, grouped_mlp_oracle
from jax_huginn.ops.norm import rms_norm, rms_norm_oracle
from jax_huginn.ops.rope import apply_rope, rope_table
from jax_huginn.ops.swiglu import swiglu, swiglu_oracle

VALUES = {"float64": 1e-12, "float32": 2e-6}
GRADIENTS = {"float64": 1e-11, "float32": 1e-5}


def assert_close(fast, oracle, tolerance):
    """Relative L2 of every leaf within the tolerance."""
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(oracle), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def routed(kind: str, tokens: int, experts: int, active: int, rng: np.random.Generator) -> jax.Array:
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :active]
    if kind == "skewed":
        chosen[: tokens // 2] = np.arange(active)
    if kind == "one expert":  # everybody's first choice; the others stay apart from it
        chosen = np.stack([np.full(tokens, 3), rng.integers(0, 3, tokens)], axis=1)
    if kind == "an expert without tokens":
        chosen = np.stack([rng.integers(0, 2, tokens), rng.integers(2, experts - 1, tokens)], axis=1)
    if kind == "experts elsewhere":
        chosen = np.where(chosen >= experts - 2, experts, chosen)
    return jnp.asarray(chosen, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kind", ["even", "skewed", "one expert", "an expert without tokens", "experts elsewhere", "a single token"]
)
def test_grouped_mlp_equals_every_expert_on_every_token(kind, dtype):
    rng = np.random.default_rng(0)
    tokens, width, experts, active, hidden = (1 if kind == "a single token" else 133), 16, 8, 2, 24
    chosen = routed(kind, tokens, experts, active, rng)
    shapes = [(tokens, width), (tokens, active), *[(experts, width, hidden)] * 2, (experts, hidden, width)]
    x, weights, *matrices = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    target = rng.normal(size=(tokens, width)).astype(dtype)

    def value_and_gradients(function):
        loss = lambda x, weights, *matrices: (function(x, chosen, weights, *matrices) * target).sum()  # noqa: E731
        values = jax.jit(function)(x, chosen, weights, *matrices)
        return values, jax.jit(jax.grad(loss, argnums=range(5)))(x, weights, *matrices)

    values, gradients = value_and_gradients(grouped_mlp)
    oracle_values, oracle_gradients = value_and_gradients(grouped_mlp_oracle)
    assert np.linalg.norm(oracle_values) > 1
    assert_close(values, oracle_values, VALUES[dtype])
    assert_close(gradients, oracle_gradients, GRADIENTS[dtype])


def test_experts_gradients_have_the_types_of_what_they_belong_to():
    """As in training: bfloat16 tokens and experts, float32 weights of the router."""
    rng = np.random.default_rng(7)
    chosen = routed("skewed", 64, 4, 2, rng)
    x, *matrices = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in [(64, 8), *[(4, 8, 8)] * 3])
    weights = jnp.asarray(rng.random((64, 2)), jnp.float32)
    loss = lambda *inputs: grouped_mlp(inputs[0], chosen, *inputs[1:]).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=range(5)))(x, weights, *matrices)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("fast", "oracle", "shapes"),
    [
        (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_oracle(x, w, 1e-6), [(2, 5, 16), (16,)]),
        (swiglu, swiglu_oracle, [(2, 5, 16)]),
    ],
    ids=["rms_norm", "swiglu"],
)
def test_gradients_written_by_hand_equal_autodiff(fast, oracle, shapes, dtype):
    rng = np.random.default_rng(8)
    inputs = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    values, vjp = jax.vjp(fast, *inputs)
    oracle_values, oracle_vjp = jax.vjp(oracle, *inputs)
    d_values = rng.normal(size=values.shape).astype(dtype)
    assert_close(values, oracle_values, VALUES[dtype])
    assert_close(vjp(d_values), oracle_vjp(d_values), GRADIENTS[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_cross_entropy_equals_full_logits(chunk, dtype):
    rng = np.random.default_rng(1)
    y, head = (rng.normal(size=shape).astype(dtype) for shape in [(3, 13, 16), (40, 16)])
    labels = rng.integers(0, 40, (3, 13))
    labels[0, :5] = IGNORE
    fast = jax.value_and_grad(lambda y, head: 3 * cross_entropy(y, head, labels, chunk), (0, 1))(y, head)
    oracle = jax.value_and_grad(lambda y, head: 3 * cross_entropy_oracle(y, head, labels), (0, 1))(y, head)
    assert_close(fast[0], oracle[0], VALUES[dtype])
    assert_close(fast[1], oracle[1], GRADIENTS[dtype])
    assert cross_entropy(y, head, labels, chunk) == pytest.approx(float(oracle[0]) / 3, rel=VALUES[dtype])


def test_cross_entropy_never_holds_the_logits():
    """The compiler's own account of temporary memory: far below the (B,S,V) logits of value and gradient."""
    batch, length, width, vocabulary = 4, 256, 32, 8192
    y, head = jnp.zeros((batch, length, width), jnp.float32), jnp.zeros((vocabulary, width), jnp.float32)
    labels = jnp.zeros((batch, length), jnp.int32)
    logits_bytes = batch * length * vocabulary * 4

    def temporary_bytes(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(y, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(lambda y, head: cross_entropy(y, head, labels, 64)) < logits_bytes / 4
    assert temporary_bytes(lambda y, head: cross_entropy_oracle(y, head, labels)) >= logits_bytes


def test_cross_entropy_of_no_labels_is_zero():
    y, head = jnp.ones((1, 4, 8)), jnp.ones((5, 8))
    labels = jnp.full((1, 4), IGNORE)
    loss, gradients = jax.value_and_grad(lambda y: cross_entropy(y, head, labels, 2))(y)
    assert loss == 0
    assert not gradients.any()


def test_library_attention_equals_the_oracle():
    q, k, v = np.random.default_rng(2).normal(size=(3, 2, 65, 4, 8)).astype(np.float32)
    assert_close(causal_attention(q, k, v, "xla"), causal_attention_oracle(q, k, v), VALUES["float32"])
    loss = lambda implementation: lambda *qkv: (causal_attention(*qkv, implementation) ** 2).sum()  # noqa: E731
    fast, oracle = (jax.grad(loss(name), (0, 1, 2))(q, k, v) for name in ("xla", "einsum"))
    assert_close(fast, oracle, GRADIENTS["float32"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("kv_heads", "biased"), [(4, False), (2, True), (1, True)])
def test_cached_attention_equals_its_oracle(kv_heads, biased, queries, dtype):
    """Rows at positions of their own, over a cache that is longer than what they may see."""
    rng = np.random.default_rng(4)
    q, k, v, bias = (
        rng.normal(size=shape).astype(dtype)
        for shape in [(3, queries, 4, 8), (3, 70, kv_heads, 8), (3, 70, kv_heads, 8), (70, 4, 8)]
    )
    index = np.array([[0], [40], [64]]) + np.arange(queries)
    inputs = q, k, v, index, bias if biased else None
    assert_close(cached_attention(*inputs), cached_attention_oracle(*inputs), VALUES[dtype])


def test_attention_sees_no_later_position():
    q, k, v = np.random.default_rng(3).normal(size=(3, 1, 9, 2, 4))
    jacobian = jax.jacobian(lambda v: causal_attention(q, k, v, "einsum")[0, :, 0, 0])(v)[:, 0, :, 0, 0]
    assert np.array_equal(jacobian != 0, np.tril(np.ones((9, 9), bool)))


def test_auto_attention_keeps_float64():
    assert resolve("auto", np.float64) == "einsum"
    assert resolve("auto", np.float32) == "einsum"  # the CPU's choice, too


def test_auto_attention_is_a_deterministic_kernel_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")])
    assert resolve("auto", jnp.bfloat16) == "cudnn"
    assert resolve("auto", jnp.bfloat16, deterministic=True) == "xla"


def test_rope_turns_interleaved_pairs_by_position_times_frequency():
    table = rope_table(5000, 8, 50_000.0)
    x = np.random.default_rng(4).normal(size=(1, 5000, 2, 8))
    turned = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(table)))
    pairs, turned_pairs = (a[..., 0::2] + 1j * a[..., 1::2] for a in (x, turned))
    angle = 4321 * 50_000.0 ** (-2 * 3 / 8)
    assert turned_pairs[0, 4321, 1, 3] == pytest.approx(pairs[0, 4321, 1, 3] * np.exp(1j * angle), rel=1e-12)


def test_rope_makes_scores_depend_on_distance_alone():
    table = jnp.asarray(rope_table(100, 8, 50_000.0))
    q, k = np.random.default_rng(5).normal(size=(2, 8))
    turn = lambda x, position: apply_rope(jnp.asarray(x).reshape(1, 1, 1, 8), table[position : position + 1]).ravel()  # noqa: E731
    assert float(turn(q, 30) @ turn(k, 20)) == pytest.approx(float(turn(q, 80) @ turn(k, 70)), rel=1e-12)


def test_rms_norm_computes_in_float32_and_scales_after_the_cast():
    x = np.random.default_rng(6).normal(size=(3, 64)).astype(jnp.bfloat16)
    weight = jnp.full(64, 1.5, jnp.bfloat16)
    h = x.astype(np.float32)
    normalized = (h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)
    result = rms_norm(jnp.asarray(x), weight, 1e-6)
    assert result.dtype == jnp.bfloat16
    assert np.array_equal(result, normalized * weight)
