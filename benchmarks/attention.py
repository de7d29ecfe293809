"""Attention's kernels: TFLOP/s forward, and of forward with backward, each checked against the oracle in float32 first.

    python benchmarks/attention.py                                          # the 3.8 B preset's shape, bfloat16
    python benchmarks/attention.py --heads 2 --head-dim 64 --length 256 --dtype float32 --kernels xla einsum   # a CPU

FLOPs count the causal half: 2 B H S^2 K forward, 2.5 times as many backward.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import median_seconds, report
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.ops.attention import causal_attention, causal_attention_oracle


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=55)
    parser.add_argument("--head-dim", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", nargs="*", default=["cudnn", "xla"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    shape = (options.batch, options.length, options.heads, options.head_dim)
    rng = np.random.default_rng(0)
    q, k, v, target = (jnp.asarray(rng.normal(size=shape), options.dtype) for _ in range(4))
    flops = 2 * options.batch * options.heads * options.length**2 * options.head_dim

    for kernel in options.kernels:
        forward = jax.jit(lambda q, k, v, kernel=kernel: causal_attention(q, k, v, kernel))
        both = jax.jit(lambda q, k, v, d_y, forward=forward: jax.vjp(forward, q, k, v)[1](d_y))
        error = error_against_oracle(forward, both, q, k, v, target)
        assert error < (2e-2 if q.dtype == jnp.bfloat16 else 1e-5), f"{kernel} is off the oracle by {error}"
        forward_seconds = median_seconds(lambda forward=forward: forward(q, k, v), options.repeats, calls=10)
        seconds = median_seconds(lambda both=both: both(q, k, v, target), options.repeats, calls=10)
        report(
            benchmark="attention",
            kernel=kernel,
            shape_bshk=shape,
            dtype=options.dtype,
            tflops_forward=flops / forward_seconds / 1e12,
            tflops_forward_backward=3.5 * flops / seconds / 1e12,
            error_against_oracle=error,
        )


def error_against_oracle(forward, both, q, k, v, target) -> float:
    """Largest relative L2 distance of the values and the three gradients, on the first heads (its scores are S x S)."""
    few = [x[:, :, :4] for x in (q, k, v, target)]
    wide = [x.astype(jnp.float32) for x in few]
    with jax.default_matmul_precision("highest"):
        value, vjp = jax.vjp(causal_attention_oracle, *wide[:3])
        references = [value, *vjp(wide[3])]
    results = [forward(*few[:3]), *both(*few)]
    return max(
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(results, references, strict=True)
    )


if __name__ == "__main__":
    run_verb(main)
