"""Scores of tasks against the depth that was set and the recurrences that were executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

import numpy as np

from jax_huginn.visualization.charts import DASHES, Axis, Chart, Dash, Lines, Section, Series, colour
from jax_huginn.visualization.results import Evaluation, Score

LEGEND = 12  # curves that are shown at once; the others wait in the legend
NOTE = "Bars: one standard error."


def sections(evaluations: Sequence[Evaluation]) -> list[Section]:
    if not evaluations:
        return []
    metrics = list(dict.fromkeys(score.metric for each in evaluations for score in each.scores))
    charts = [chart for metric in metrics for chart in _charts(metric, evaluations)]
    names = ", ".join(each.name for each in evaluations)
    return [Section("Evaluation", charts, f"Tasks of lm-eval: {names}.")]


def _charts(metric: str, evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """A metric against the depth and, where a criterion ended the recurrence, against the recurrences executed."""
    key = "score_" + "".join(letter if letter.isalnum() else "_" for letter in metric).strip("_")
    title = metric.replace("_", " ")
    rows = [(each, score) for each in evaluations for score in each.scores if score.metric == metric]
    fixed = [(each, score) for each, score in rows if score.depth.isdigit()]
    if fixed:
        series = _curves(fixed, evaluations, lambda score: int(score.depth))
        ticks = sorted({x for each in series for x in each.x.tolist()})
        recurrences = Axis("recurrences", log=min(ticks) < max(ticks), ticks=ticks)
        yield Lines(key, f"{title} by recurrence", recurrences, Axis(metric), series, note=NOTE)
    if len(fixed) < len(rows):
        adaptive = [(each, score) for each, score in rows if not score.depth.isdigit()]
        series = [
            *_curves(fixed, evaluations, lambda score: score.used),
            *_curves(adaptive, evaluations, lambda score: score.used, "exit, steps used", "dot"),
            *_curves(adaptive, evaluations, lambda score: score.computed, "exit, steps computed", "dash"),
        ]
        axis = Axis("recurrences per token, mean", log=True, ticks=[2**power for power in range(12)])
        note = f"{NOTE} Solid: depths. Dotted and dashed: exit criteria; exited tokens are computed along."
        yield Lines(f"{key}_executed", f"{title} by executed recurrences", axis, Axis(metric), series, note=note)


def _curves(
    rows: Sequence[tuple[Evaluation, Score]],
    evaluations: Sequence[Evaluation],
    x_of: Callable[[Score], float],
    what: str = "",
    dash: Dash | None = None,
) -> list[Series]:
    """One curve for every model and task; models differ by dash, tasks by colour."""
    tasks = list(dict.fromkeys(score.task for _, score in rows))
    curves = []
    for place, evaluation in enumerate(evaluations):
        for task in tasks:
            found: list[Score] = [s for each, s in rows if each is evaluation and s.task == task]
            found = sorted((s for s in found if math.isfinite(x_of(s)) and math.isfinite(s.value)), key=x_of)
            if not found:
                continue
            model = evaluation.name if len(evaluations) > 1 else ""
            name = " · ".join(filter(None, [task, model, what]))
            hover = [
                f"{name}<br>{score.depth}: {score.value:.4g}"
                + (f" ± {score.error:.2g}" if math.isfinite(score.error) else "")
                + (f"<br>used {score.used:.2f}, computed {score.computed:.2f}" if what else "")
                for score in found
            ]
            index = tasks.index(task) if len(tasks) > 1 else place
            columns = (x_of, attrgetter("value"), attrgetter("error"))
            x, y, error = (np.array([column(score) for score in found], float) for column in columns)
            curves.append(
                Series(
                    name,
                    x,
                    y,
                    colour(index),
                    dash or DASHES[place % len(DASHES)],
                    error,
                    style="lines+markers",
                    hover=hover,
                    hidden=len(curves) >= LEGEND,
                )
            )
    return curves
