"""What the backward pass keeps of the values within a block, by `compute.remat`; the others it computes again.

The code names what may be kept (`jax.ad_checkpoint.checkpoint_name`): "gate_up", the first matmul of a gated MLP or of
an expert, which is most of a block's memory; "matmul", the results of the other matmuls as far as a gradient needs
them; "attention", attention's output.
"""

from typing import Any

import jax
import jax.extend.core


def _statistics(primitive: jax.extend.core.Primitive, *_: Any, **params: Any) -> bool:
    """Of cuDNN's attention, what its backward pass needs of the softmax; without it the forward kernel runs again."""
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
