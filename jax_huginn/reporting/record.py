"""The record of a step: every metric's name, unit and meaning, and how a record is made from a step's arrays.

Writers, console, warnings and the table of the training guide are made from `METRICS`. Imports no JAX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Record = dict[str, Any]
"""Flat: metric name -> number, boolean or list of numbers; `step` is always there."""
COLLAPSE_SHARE = 0.5
"""A single expert above this share of the assignments means that the router has collapsed."""
LOW_UTILIZATION = 0.5

When = Literal["every step", "logged steps", "validated steps", "where it applies"]
Group = Literal["train", "val", "router", "recurrence", "speed", "data"]


@dataclass(frozen=True)
class Metric:
    """One kind of number that a run reports; `{r}` and `{i}` in its name stand for a depth and an expert."""

    name: str
    group: Group
    unit: str
    when: When
    meaning: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.sub(r"\\{\w\\}", r"\\d+", re.escape(self.name)), name) is not None


# In the order in which they are shown.
METRICS = (
    Metric("step", "train", "", "every step", "optimiser steps done, counted from 1"),
    Metric("loss", "train", "nats/token", "every step", "cross-entropy"),
    Metric("objective", "train", "nats/token", "every step", "the loss with its auxiliaries: what is minimised"),
    Metric("learning_rate", "train", "", "every step", "learning rate of this step"),
    Metric("grad_norm", "train", "", "every step", "global norm of the gradient before clipping"),
    Metric("param_norm", "train", "", "every step", "global norm of the weights after the step"),
    Metric("skipped_updates", "train", "", "every step", "updates skipped so far because a number was not finite"),
    Metric("non_finite", "train", "", "where it applies", "micro-batches with a loss or gradient that is not finite"),
    Metric("tokens", "train", "tokens", "every step", "training tokens seen so far"),
    Metric("epochs", "train", "", "where it applies",
           "epochs seen so far, to a shuffle window; a mean over the streams of process 0; hub: whole files only"),
    Metric("n", "recurrence", "", "every step", "recurrences without gradient, mean over the micro-batches"),
    Metric("k", "recurrence", "", "every step", "recurrences with gradient, mean over the micro-batches"),
    Metric("recurrent_residual", "recurrence", "", "logged steps",
           "mean distance between the last two states, as the core leaves them; the public run takes norms first"),
    Metric("rel_residual", "recurrence", "", "logged steps", "`recurrent_residual` relative to the state's norm"),
    Metric("recurrent_state_norm", "recurrence", "", "logged steps",
           "mean norm of the last state, as the core leaves it"),
    Metric("recurrent_state_token_corr", "recurrence", "", "logged steps",
           "mean correlation of a sequence's states; near 1 the tokens have become alike"),
    Metric("last_hidden_token_corr", "recurrence", "", "logged steps",
           "mean correlation of a sequence's hidden states before the head"),
    Metric("load_balance_loss", "router", "", "logged steps", "1 when balanced"),
    Metric("router_z_loss", "router", "", "logged steps", "mean squared logsumexp of the router's logits"),
    Metric("routing_entropy", "router", "nats", "logged steps", "mean entropy of the router's softmax"),
    Metric("expert_utilization", "router", "", "logged steps", "share of the experts that got a token"),
    Metric("gini_coefficient", "router", "", "logged steps", "inequality of the experts' loads: 0 when equal"),
    Metric("top_expert_usage_pct", "router", "%", "logged steps", "share of the assignments of the busiest expert"),
    Metric("max_expert_attention", "router", "", "logged steps", "largest mean softmax probability of an expert"),
    Metric("min_expert_attention", "router", "", "logged steps", "smallest mean softmax probability of an expert"),
    Metric("attention_spread", "router", "", "logged steps", "`max_expert_attention` less `min_expert_attention`"),
    Metric("attention_variance", "router", "", "logged steps", "variance of the experts' mean probabilities"),
    Metric("dropped_token_ratio", "router", "", "logged steps",
           "share of the assignments dropped; 0 except for `parallel.dispatch` `all_to_all`"),
    Metric("router_collapse_warning", "router", "", "logged steps",
           "whether one expert has more than half of the assignments"),
    Metric("low_expert_diversity_warning", "router", "", "logged steps",
           "whether less than half of the experts are used"),
    Metric("expert_counts", "router", "", "logged steps", "assignments of each expert"),
    Metric("expert_preference", "router", "", "logged steps", "share of the tokens whose first choice an expert is"),
    Metric("expert_{i}_token_ratio", "router", "", "logged steps", "share of the assignments of expert i"),
    Metric("expert_{i}_importance", "router", "", "logged steps", "mean softmax probability of expert i"),
    Metric("val_loss_r{r}", "val", "nats/token", "validated steps", "held-out loss at r recurrences"),
    Metric("val_bpb_r{r}", "val", "bits/byte", "validated steps",
           "held-out loss per byte, which compares models of different tokenizers; needs a byte-level tokenizer"),
    Metric("val_accuracy_r{r}", "val", "", "validated steps",
           "share of the held-out labels that are the most likely token at r recurrences; where rows have groups"),
    Metric("val_accuracy_r{r}_by_group", "val", "", "validated steps", "the same for each of `val_groups`"),
    Metric("val_groups", "val", "", "validated steps", "the groups, which in a generated task are its difficulties"),
    Metric("val_group_labels", "val", "labels", "validated steps", "held-out labels of each group"),
    Metric("tokens_per_second", "speed", "tokens/s", "logged steps", "since the last logged step, without pauses"),
    Metric("tflops_per_second", "speed", "TFLOP/s", "logged steps", "model operations, without recomputation"),
    Metric("mfu", "speed", "", "logged steps", "share of the devices' bf16 peak; only on devices whose peak is known"),
    Metric("peak_memory_gb", "speed", "GB", "logged steps", "largest memory in use on a device so far; not on CPUs"),
    Metric("data_rows_skipped", "data", "rows", "where it applies", "bad rows skipped so far"),
    Metric("data_files_skipped", "data", "files", "where it applies", "bad files skipped so far"),
)  # fmt: skip


def metric_of(name: str) -> Metric:
    """The metric that a name of a record belongs to.

    Raises:
        KeyError: no metric has this name: add it to `METRICS`.
    """
    for metric in METRICS:
        if metric.matches(name):
            return metric
    raise KeyError(name)


def tag(name: str) -> str:
    """The grouped name for TensorBoard and Weights & Biases: 'train/loss'."""
    return f"{metric_of(name).group}/{name}"


def in_order(record: Record) -> Record:
    """The record in the order of `METRICS`; raises KeyError where a name is unknown."""
    place = {metric.name: index for index, metric in enumerate(METRICS)}
    return dict(sorted(record.items(), key=lambda item: place[metric_of(item[0]).name]))


def markdown_table() -> str:
    """The table of the training guide."""
    rows = [f"| `{each.name}` | {each.when} | {each.unit} | {each.meaning} |" for each in METRICS]
    return "\n".join(["| key | in records of | unit | meaning |", "|---|---|---|---|", *rows])


# ---- Making a record ------------------------------------------------------------------------------------------------


def step_record(step: int, metrics: Any, n: float, k: float) -> Record:
    """What every step reports.

    Args:
        metrics: `training.step.StepMetrics` as host arrays.
        n, k: means over the micro-batches.
    """
    record: Record = {
        "step": step,
        "loss": float(metrics.loss),
        "objective": float(metrics.objective),
        "learning_rate": float(metrics.learning_rate),
        "grad_norm": float(metrics.grad_norm),
        "param_norm": float(metrics.param_norm),
        "skipped_updates": int(metrics.skipped),
        "n": n,
        "k": k,
    }
    if not (metrics.finite_U.all() and np.isfinite(metrics.grad_norm)):
        record["non_finite"] = np.flatnonzero(~metrics.finite_U).tolist()
    return record


def detailed_record(metrics: Any) -> Record:
    """What a logged step reports besides: the recurrence and the routing. `metrics` as in `step_record`."""
    record = {name: float(value) for name, value in metrics.recurrence.items()}
    return record if metrics.moe is None else record | routing_metrics(metrics.moe)


def routing_metrics(routing: Any) -> Record:
    """Every routing statistic of one step; `routing` is a `model.moe.Routing` of host arrays.

    Utilization, Gini and top share are computed from f, the share of the assignments; attention maximum, minimum,
    spread and variance from P, the mean softmax probability.
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


def validation_record(losses: dict[int, tuple[float, float | None]]) -> Record:
    """Depth -> (nats per token, bits per byte or None), as metrics."""
    record = {}
    for depth, (nats, bits) in losses.items():
        record[f"val_loss_r{depth}"] = nats
        if bits is not None:
            record[f"val_bpb_r{depth}"] = bits
    return record


def accuracy_record(hits: dict[int, np.ndarray], labels: np.ndarray) -> Record:
    """Accuracy as metrics, as a whole and by group.

    Args:
        hits: depth -> number of right answers of every group.
        labels: number of labels of every group; groups without any are left out.
    """
    groups = np.flatnonzero(labels)
    record: Record = {"val_groups": groups.tolist(), "val_group_labels": labels[groups].tolist()}
    for depth, right in hits.items():
        record[f"val_accuracy_r{depth}"] = float(right.sum() / max(labels.sum(), 1))
        record[f"val_accuracy_r{depth}_by_group"] = (right[groups] / labels[groups]).tolist()
    return record
