"""The grouped expert MLP against its bounds: useful TFLOP/s, forward and forward with backward, dropless.

    python benchmarks/grouped_mlp.py                # 16 384 rows over 8 experts, D=5280, M=1792, bfloat16
    python benchmarks/grouped_mlp.py --tokens 512 --width 64 --hidden 128 --dtype float32      # on a CPU

Groups are even, typical (the largest 1.12 x the mean) and skewed (2 x). Each case is checked against the oracle first.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import median_seconds, report
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.ops.grouped_mlp import grouped_mlp, grouped_mlp_oracle

LARGEST = {"even": 1.0, "typical": 1.12, "skewed": 2.0}


def routing(tokens: int, experts: int, active: int, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Distinct experts for each token, the first expert's group `largest` times the mean: (T,A) int32."""
    rows = tokens * active
    counts = np.full(experts, rows / experts)
    counts[0] *= largest
    counts[1:] *= (rows - counts[0]) / counts[1:].sum()
    edges = np.round(np.cumsum(counts)).astype(int)
    ids = np.searchsorted(edges, np.arange(rows), side="right")
    # Sorted ids that lie `tokens` apart differ, since no group is larger than `tokens`.
    return rng.permutation(ids.reshape(active, tokens).T).astype(np.int32)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--width", type=int, default=5280)
    parser.add_argument("--hidden", type=int, default=1792)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    tokens, experts, active = options.tokens, options.experts, options.active
    width, hidden, dtype = options.width, options.hidden, jnp.dtype(options.dtype)
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    x_TD, target_TD = draw(tokens, width), draw(tokens, width)
    weights_TA = jnp.asarray(rng.dirichlet(np.ones(active), tokens), jnp.float32)
    matrices = [draw(experts, width, hidden, scale=width**-0.5) for _ in range(2)]
    matrices.append(draw(experts, hidden, width, scale=hidden**-0.5))
    useful = 6 * tokens * active * width * hidden

    def gradients(function):
        def loss(x_TD, weights_TA, experts_TA, *matrices):
            return jnp.sum(function(x_TD, experts_TA, weights_TA, *matrices) * target_TD, dtype=jnp.float32)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3, 4, 5)))

    # Two batched matmuls over equal groups and nothing else: what no dispatch can beat.
    grid_ECD = draw(experts, tokens * active // experts, width)

    @jax.jit
    def bound(x_ECD, w_gate, w_up, w_down):
        def run(x_ECD, w_gate, w_up, w_down):
            h = jax.nn.silu(jnp.einsum("ecd,edm->ecm", x_ECD, w_gate)) * jnp.einsum("ecd,edm->ecm", x_ECD, w_up)
            return jnp.einsum("ecm,emd->ecd", h, w_down)

        y, vjp = jax.vjp(run, x_ECD, w_gate, w_up, w_down)
        return y, vjp(y)

    seconds = median_seconds(lambda: bound(grid_ECD, *matrices), options.repeats, calls=5)
    shapes = {"rows": tokens * active, "experts": experts, "width": width, "hidden": hidden, "dtype": options.dtype}
    report(benchmark="grouped_mlp", case="bound", **shapes, tflops_forward_backward=3 * useful / seconds / 1e12)

    for case, largest in LARGEST.items():
        experts_TA = jnp.asarray(routing(tokens, experts, active, largest, rng))
        group = int(jnp.bincount(experts_TA.ravel(), length=experts).max())
        forward, both = jax.jit(grouped_mlp), gradients(grouped_mlp)
        error = relative_error(
            both(x_TD, weights_TA, experts_TA, *matrices),
            gradients(grouped_mlp_oracle)(x_TD, weights_TA, experts_TA, *matrices),
        )
        assert error < (3e-2 if dtype == jnp.bfloat16 else 1e-4), f"{case}: off the oracle by {error}"
        run_forward = partial(forward, x_TD, experts_TA, weights_TA, *matrices)
        forward_seconds = median_seconds(run_forward, options.repeats, calls=5)
        seconds = median_seconds(partial(both, x_TD, weights_TA, experts_TA, *matrices), options.repeats, calls=5)
        report(
            benchmark="grouped_mlp",
            case=case,
            **shapes,
            largest_over_mean=group * experts / (tokens * active),
            tflops_forward=useful / forward_seconds / 1e12,
            tflops_forward_backward=3 * useful / seconds / 1e12,
            error_against_oracle=error,
        )


def relative_error(results, references) -> float:
    """Largest relative L2 distance among the gradients."""
    pairs = zip(jax.tree.leaves(results[1]), jax.tree.leaves(references[1]), strict=True)
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in wide)


if __name__ == "__main__":
    run_verb(main)
