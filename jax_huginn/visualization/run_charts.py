"""The charts of runs: what they are made of, and how several runs share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_huginn.reporting.record import METRICS, metric_of
from jax_huginn.visualization.charts import (
    DASHES,
    Axis,
    Bars,
    Chart,
    HeatMap,
    Lines,
    Section,
    Series,
    colour,
    ordered_colour,
)
from jax_huginn.visualization.records import Run
from jax_huginn.visualization.thinning import POINTS, averaged, every_nth, extremes, running_mean

SMOOTHED = 100  # points from which a noisy curve is drawn pale, with its running mean over it


@dataclass(frozen=True)
class Panel:
    """A chart of metrics over the steps. `{r}` in a name stands for one curve per depth."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    noisy: bool = True
    zero: bool = False
    """Whether its axis shows 0."""
    wide: bool = False


TRAINING = (
    Panel("Training loss", ("loss",), wide=True),
    Panel("Learning rate", ("learning_rate",), noisy=False, zero=True),
    Panel("Gradient norm", ("grad_norm",), log=True),
    Panel("Loss with its auxiliaries", ("objective",)),
    Panel("Norm of the weights", ("param_norm",), noisy=False),
)
DEPTH = (
    Panel("Held-out loss", ("val_loss_r{r}",), noisy=False),
    Panel("Held-out bits per byte", ("val_bpb_r{r}",), noisy=False),
    Panel("Held-out accuracy", ("val_accuracy_r{r}",), noisy=False),
)
STATES = (
    Panel("Norm of the state", ("recurrent_state_norm",)),
    Panel("Residual of the last recurrence", ("recurrent_residual",), log=True),
    Panel("Relative residual", ("rel_residual",), log=True),
    Panel("Likeness of the tokens", ("recurrent_state_token_corr", "last_hidden_token_corr")),
)
EXPERTS = (
    Panel("Gini coefficient of the load", ("gini_coefficient",)),
    Panel("Entropy of the router", ("routing_entropy",)),
    Panel("Busiest expert", ("top_expert_usage_pct",)),
    Panel("Experts in use", ("expert_utilization",), zero=True),
    Panel("Balance loss", ("load_balance_loss",)),
    Panel("Router z-loss", ("router_z_loss",)),
    Panel("Mean probability of an expert", ("max_expert_attention", "min_expert_attention", "attention_spread")),
    Panel("Variance of the mean probabilities", ("attention_variance",)),
    Panel("Dropped assignments", ("dropped_token_ratio",)),
)
SPEED = (
    Panel("Throughput", ("tokens_per_second",)),
    Panel("Model FLOPs", ("tflops_per_second",)),
    Panel("Model FLOPs utilisation (MFU)", ("mfu",)),
    Panel("Peak memory", ("peak_memory_gb",), noisy=False, zero=True),
    Panel("Skipped updates", ("skipped_updates",), noisy=False),
    Panel("Skipped rows and files", ("data_rows_skipped", "data_files_skipped"), noisy=False),
)
PANELS = (*TRAINING, *DEPTH, *STATES, *EXPERTS, *SPEED)
DRAWN_OTHERWISE = {
    "step": "the axis",
    "tokens": "the head of the page",
    "epochs": "follows the tokens",
    "val_accuracy_r{r}_by_group": "the chart by group",
    "val_groups": "the chart by group",
    "val_group_labels": "the error bars of that chart",
    "n": "the histogram of depths",
    "k": "the histogram of depths",
    "non_finite": "the head of the page",
    "expert_counts": "the heat map of the load",
    "expert_preference": "follows the load closely",
    "expert_{i}_token_ratio": "the heat map of the load",
    "expert_{i}_importance": "its extremes, spread and variance are",
    "router_collapse_warning": "the head of the page",
    "low_expert_diversity_warning": "the head of the page",
}


def sections(runs: Sequence[Run]) -> list[Section]:
    """All sections that the runs' records can fill, in the order of the page."""
    found = [
        Section("Training", list(_panels(TRAINING, runs))),
        Section(
            "Depth",
            [*_panels(DEPTH, runs), *_loss_by_depth(runs), *_accuracy_by_group(runs), *_depths(runs)],
            "Held-out data at several numbers of recurrences.",
        ),
        Section("States", [*_convergence(runs), *_panels(STATES, runs)], "Whether the recurrence converges."),
        Section("Experts", [*_loads(runs), *_panels(EXPERTS, runs)], "What the router does with the tokens."),
        Section("Speed", list(_panels(SPEED, runs))),
    ]
    return [section for section in found if section.charts]


def missing(runs: Sequence[Run]) -> list[str]:
    """Metrics of speed that no record of the runs has, with their meanings, which say when they are there."""
    return [
        f"{each.name} ({each.meaning})"
        for each in METRICS
        if each.group == "speed" and not any(each.matches(name) for run in runs for name in run.columns)
    ]


# ---- Curves over the steps ------------------------------------------------------------------------------------------


def _panels(panels: Sequence[Panel], runs: Sequence[Run]) -> Iterator[Chart]:
    for panel in panels:
        curves = [(run, name, label) for run in runs for name, label in _curves(panel, run)]
        if not curves:
            continue
        if all(name in COUNTS for _, name, _ in curves) and not any(run.numbers(name).any() for run, name, _ in curves):
            continue  # nothing was skipped: the head of the page says so
        metrics = [metric_of(name) for name in dict.fromkeys(name for _, name, _ in curves)]
        series = [
            each
            for run, name, label in curves
            for each in _series(run, name, panel.noisy, *_look(panel, runs, run, name, label))
        ]
        units = {metric.unit for metric in metrics}
        unit = units.pop() if len(units) == 1 else ""
        meanings = dict.fromkeys(_sentence(metric.meaning) for metric in metrics)
        window = max((_window(run.steps(name).size) for run, name, _ in curves if panel.noisy), default=1)
        if window > 1:
            meanings[f"Pale: the records. Bold: the mean of the {window} around."] = None
        yield Lines(
            panel.metrics[0].replace("_r{r}", "_by_depth"),
            panel.title,
            Axis("step"),
            Axis(unit, log=panel.log, zero=panel.zero),
            series,
            _bounds(panel, runs),
            note=" ".join(meanings),
            wide=panel.wide,
        )


COUNTS = ("skipped_updates", "dropped_token_ratio", "data_rows_skipped", "data_files_skipped")
"""Metrics that are 0 when all is well."""


def _curves(panel: Panel, run: Run) -> list[tuple[str, str]]:
    """(metric, label) of the panel's metrics that the run has."""
    found = []
    for name in panel.metrics:
        if "{r}" in name:
            found += [(each, f"r = {depth}") for depth, each in run.family(name)]
        elif name in run:
            found.append((name, name.replace("_", " ") if len(panel.metrics) > 1 else ""))
    return found


def _look(panel: Panel, runs: Sequence[Run], run: Run, name: str, label: str) -> tuple[str, str, int]:
    """(name in the legend, colour, dash): several runs differ by colour, or by dash where the colour is the depth."""
    place = runs.index(run)
    legend = " · ".join(filter(None, [label, run.name if len(runs) > 1 else ""]))
    if "{r}" in panel.metrics[0]:
        depths = sorted({depth for each in runs for depth, _ in each.family(panel.metrics[0])})
        depth = int(label.removeprefix("r = "))
        return legend, ordered_colour(depths.index(depth), len(depths)), place
    if len(runs) == 1:
        return legend, colour(panel.metrics.index(name)), 0
    return legend, colour(place), panel.metrics.index(name)


def _series(run: Run, name: str, noisy: bool, legend: str, tint: str, dash: int) -> Iterator[Series]:
    steps, values = run.steps(name), run.numbers(name)
    values = np.where(np.isfinite(values), values, np.nan)
    kept, window = extremes(values), _window(steps.size)
    dashes, style = DASHES[dash % len(DASHES)], "lines+markers" if steps.size <= 30 else "lines"
    if noisy and window > 1:
        yield Series("", steps[kept], values[kept], tint, faint=True)
        kept, values = every_nth(steps.size), running_mean(values, window)
    yield Series(legend, steps[kept], values[kept], tint, dashes, style=style)


def _window(points: int) -> int:
    """Points over which a noisy curve is averaged: 2 % of them, an odd number; 1 for a short curve."""
    return 1 if points < SMOOTHED else points // 100 * 2 + 1


def _bounds(panel: Panel, runs: Sequence[Run]) -> list[tuple[float, str]]:
    if panel.metrics != ("routing_entropy",):
        return []
    counts = {run.config.get("moe.experts") for run in runs}
    return [(float(np.log(n)), f"ln {n}: all experts equally likely") for n in counts if isinstance(n, int) and n]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


# ---- Depth ----------------------------------------------------------------------------------------------------------


def _loss_by_depth(runs: Sequence[Run]) -> Iterator[Chart]:
    """The last validation of every run against the depth."""
    metric, unit = "val_loss_r{r}", "nats/token"
    if all(run.family("val_bpb_r{r}") for run in runs):
        metric, unit = "val_bpb_r{r}", "bits/byte"
    series = []
    for place, run in enumerate(runs):
        found = [(depth, name) for depth, name in run.family(metric) if np.isfinite(run.numbers(name)[-1])]
        if len(found) > 1:
            depths = np.array([depth for depth, _ in found], float)
            losses = np.array([run.numbers(name)[-1] for _, name in found])
            step = int(run.steps(found[0][1])[-1])
            legend = f"{run.name}, step {step}" if len(runs) > 1 else ""
            series.append(Series(legend, depths, losses, colour(place), style="lines+markers"))
    if series:
        ticks = sorted({depth for each in series for depth in each.x.tolist()})
        yield Lines(
            "loss_by_depth", "Held-out loss by depth, last validation",
            Axis("recurrences", log=True, ticks=ticks), Axis(unit), series,
            note=f"The mean depth of training is {means}." if (means := _mean_depths(runs)) else "",
        )  # fmt: skip


def _accuracy_by_group(runs: Sequence[Run]) -> Iterator[Chart]:
    """The last validation's accuracy of every group, which in a generated task is a difficulty."""
    series = []
    depths = sorted({depth for run in runs for depth, _ in run.family("val_accuracy_r{r}_by_group")})
    for place, run in enumerate(runs):
        for depth, name in run.family("val_accuracy_r{r}_by_group"):
            columns = [run.columns[each][1][-1] for each in ("val_groups", name, "val_group_labels") if each in run]
            if len(columns) < 3 or len({len(column) for column in columns}) > 1:
                continue
            groups, share, labels = np.array(columns, float)
            error = np.sqrt(share * (1 - share) / np.maximum(labels, 1))
            legend = " · ".join([f"r = {depth}"] + ([run.name] if len(runs) > 1 else []))
            tint = ordered_colour(depths.index(depth), len(depths))
            dash = DASHES[place % len(DASHES)]
            series.append(Series(legend, groups, share, tint, dash, error, style="lines+markers"))
    if series:
        yield Lines(
            "accuracy_by_group", "Held-out accuracy by group, last validation", Axis("group"), Axis("", zero=True),
            series, note="In a generated task a group is a difficulty. Bars: one standard error.", wide=True,
        )  # fmt: skip


def _mean_depths(runs: Sequence[Run]) -> str:
    means = {str(run.config.get("recurrence.mean", "")) for run in runs} - {""}
    return " and ".join(sorted(means))


def _depths(runs: Sequence[Run]) -> Iterator[Chart]:
    """How often every depth was sampled."""
    groups, several = [], False
    for place, run in enumerate(runs):
        if "n" not in run or "k" not in run:
            continue
        size = min(run.numbers("n").size, run.numbers("k").size)
        depths = run.numbers("n")[:size] + run.numbers("k")[:size]
        several |= run.config.get("train.micro_batches", 1) > 1
        width = max(1, round((depths.max() - depths.min()) / 100))
        counts = np.bincount((depths / width).round().astype(int))
        filled = np.flatnonzero(counts)
        bins = np.arange(filled[0], filled[-1] + 1)
        share = 100 * counts[bins] / counts.sum()
        groups.append((run.name if len(runs) > 1 else "", bins * float(width), share, colour(place)))
    if groups:
        note = "Recurrences of a training step, n without and k with gradient."
        if several:
            note = "Recurrences of a training step, n + k, mean over its micro-batches."
        yield Bars(
            "sampled_depths", "Sampled depths", Axis("n + k"), Axis("% of the steps"), groups,
            _mean_marks(runs), note=note,
        )  # fmt: skip


def _mean_marks(runs: Sequence[Run]) -> list[tuple[float, str]]:
    means = {float(run.config["recurrence.mean"]) for run in runs if "recurrence.mean" in run.config}
    return [(mean, f"recurrence.mean = {mean:g}") for mean in sorted(means)]


# ---- States ---------------------------------------------------------------------------------------------------------


def _convergence(runs: Sequence[Run]) -> Iterator[Chart]:
    """The relative residual of every logged step against the depth that was sampled for it."""
    series = []
    for place, run in enumerate(runs):
        if not all(name in run for name in ("n", "k", "rel_residual")):
            continue
        depth = dict(zip(run.steps("n").tolist(), run.numbers("n"), strict=True))
        for step, k in zip(run.steps("k").tolist(), run.numbers("k"), strict=True):
            depth[step] = depth.get(step, np.nan) + k
        steps, residual = run.steps("rel_residual"), run.numbers("rel_residual")
        for half, tint in ((0, "#9fb3c8"), (1, colour(place))):
            chosen = np.flatnonzero((steps > run.last_step / 2) == bool(half))
            chosen = chosen[every_nth(chosen.size, POINTS // 2)] if chosen.size else chosen
            x = np.array([depth.get(step, np.nan) for step in steps[chosen].tolist()])
            name = ", ".join(filter(None, [("first half", "second half")[half], run.name if len(runs) > 1 else ""]))
            hover = [f"step {step:,}<br>n + k = {d:g}<br>{value:.3g}" for step, d, value in
                     zip(steps[chosen].tolist(), x, residual[chosen], strict=True)]  # fmt: skip
            if chosen.size and (half or len(runs) == 1):
                series.append(Series(name, x, residual[chosen], tint, style="markers", hover=hover))
    if series:
        yield Lines(
            "residual_by_depth", "Relative residual by depth", Axis("n + k"), Axis("", log=True), series,
            note="The distance between the last two states, relative to the state's norm, at the depth that was sampled"
            " for the step: the faster it falls, the sooner the recurrence converges.", wide=True,
        )  # fmt: skip


# ---- Experts --------------------------------------------------------------------------------------------------------


def _loads(runs: Sequence[Run]) -> Iterator[Chart]:
    for place, run in enumerate(runs):
        if "expert_counts" not in run:
            continue
        steps, lists = run.columns["expert_counts"]
        experts = len(lists[-1])
        whole = np.array([len(counts) == experts if isinstance(counts, list) else False for counts in lists])
        counts_RE = np.array([counts for counts, fits in zip(lists, whole, strict=True) if fits], float)
        share_RE = counts_RE / np.maximum(counts_RE.sum(axis=1, keepdims=True), 1)
        load_ER = averaged(share_RE).T * experts
        columns = averaged(steps[whole].astype(float))
        merged = -(-int(whole.sum()) // columns.size)
        note = "The share of the assignments that an expert gets, relative to an equal share: 1 is balanced."
        if merged > 1:
            note += f" A column is the mean of up to {merged} records."
        suffix = f", {run.name}" if len(runs) > 1 else ""
        hover = [
            [
                f"step {step:,.0f}<br>expert {expert}<br>{load:.3f} x an equal share<br>{100 * load / experts:.2f} %"
                for step, load in zip(columns, row, strict=True)
            ]
            for expert, row in enumerate(load_ER)
        ]
        yield HeatMap(
            f"expert_load_{place}" if len(runs) > 1 else "expert_load",
            f"Load of the experts{suffix}", Axis("step"), Axis("expert"), columns.tolist(),
            [str(expert) for expert in range(experts)], load_ER, "load", 0.0, 2.0, diverging=True,
            hover=hover, note=note, wide=True,
        )  # fmt: skip
