"""Rematerialisation policies by `compute.remat`: which activations the backward pass keeps; it recomputes the others.

Activations that may be kept are named by `jax.ad_checkpoint.checkpoint_name`: "gate_up", the first matmul of a gated
MLP or expert and most of a block's memory; "matmul", the results of all other matmuls that a gradient needs;
"attention", the output of attention.
"""

from typing import Any

import jax
import jax.extend.core


def _statistics(primitive: jax.extend.core.Primitive, *_: Any, **params: Any) -> bool:
    """Keep the softmax statistics of cuDNN attention; otherwise its forward kernel runs again in the backward pass."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _keep(*names: str):
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), _statistics)


KEPT = {
    "none": ("attention", "matmul", "gate_up"),  # and everything else
    "dots": ("attention", "matmul", "gate_up"),
    "dots_except_gate_up": ("attention", "matmul"),
    "attention": ("attention",),
    "full": (),
}
POLICIES = {name: _keep(*kept) for name, kept in KEPT.items()} | {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
