"""Standard errors of scores whose questions come in groups, such as several from one file."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any


def clustered_error(totals: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of sum(totals) / sum(weights) where only different clusters are independent.

    sqrt(G / (G - 1) * sum over clusters of (its totals - ratio * its weights)^2) / sum(weights), of G clusters: with a
    cluster for every question and weights of 1, the ordinary error of a mean. Source: Liang and Zeger 1986, and Miller
    2024 (arXiv 2411.00640) for evaluations. NaN with fewer than two clusters.
    """
    ratio = sum(totals) / sum(weights)
    deviations: dict[Hashable, float] = defaultdict(float)
    for total, weight, cluster in zip(totals, weights, clusters, strict=True):
        deviations[cluster] += total - ratio * weight
    count = len(deviations)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * sum(each**2 for each in deviations.values())) / sum(weights)


def cluster_errors(results: dict[str, Any], column: str, samples: Sequence[dict[str, Any]]) -> None:
    """Replace the standard errors in lm-eval's results of one task; `column` of a question names its cluster."""
    clusters = [sample["doc"][column] for sample in samples]
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if metric == "bits_per_byte":  # (log-likelihood in nats, bytes)
            totals, weights = zip(*((-nats / math.log(2), size) for nats, size in values), strict=True)
        elif isinstance(values[0], int | float):
            totals, weights = values, [1.0] * len(values)
        else:
            continue
        results[f"{metric}_stderr,none"] = clustered_error(totals, weights, clusters)
