"""From a step's arrays to the flat record that is logged."""

from typing import Any

import numpy as np

from jax_huginn.model.moe import Routing

COLLAPSE_SHARE = 0.5
"""A single expert above this share of the assignments means that the router has collapsed."""
LOW_UTILIZATION = 0.5


def routing_metrics(routing: Routing) -> dict[str, Any]:
    """Every routing statistic of one step; `routing` holds host arrays.

    f is the share of assignments, P the mean softmax probability: utilization, Gini and top share are of f; attention
    maximum, minimum, spread and variance are of P.
    """
    counts_E, probability_E = np.asarray(routing.counts_E, float), np.asarray(routing.probability_E, float)
    share_E = counts_E / max(counts_E.sum(), 1)
    first_E = np.asarray(routing.first_choice_E, float)
    utilization = float((counts_E > 0).mean())
    record = {
        "expert_counts": counts_E.astype(int).tolist(),
        "expert_utilization": utilization,
        "routing_entropy": float(routing.entropy),
        "load_balance_loss": float(routing.balance_loss),
        "router_z_loss": float(routing.z_loss),
        "expert_preference": (first_E / max(first_E.sum(), 1)).tolist(),
        "max_expert_attention": float(probability_E.max()),
        "min_expert_attention": float(probability_E.min()),
        "attention_spread": float(probability_E.max() - probability_E.min()),
        "attention_variance": float(probability_E.var()),
        "gini_coefficient": gini(share_E),
        "top_expert_usage_pct": float(100 * share_E.max()),
        "router_collapse_warning": bool(share_E.max() > COLLAPSE_SHARE),
        "low_expert_diversity_warning": bool(utilization < LOW_UTILIZATION),
        "dropped_token_ratio": float(routing.dropped) / max(counts_E.sum(), 1),
    }
    for index, (share, importance) in enumerate(zip(share_E, probability_E, strict=True)):
        record[f"expert_{index}_token_ratio"] = float(share)
        record[f"expert_{index}_importance"] = float(importance)
    return record


def gini(share_E: np.ndarray) -> float:
    """Gini coefficient of non-negative shares: 0 when equal, (E-1)/E when one expert has all."""
    ordered, count = np.sort(share_E), share_E.size
    ranks = np.arange(1, count + 1)
    return float(np.sum((2 * ranks - count - 1) * ordered) / (count * max(ordered.sum(), 1e-30)))
