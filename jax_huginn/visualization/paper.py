"""Charts as PNG and SVG files, by matplotlib, for papers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from jax_huginn.config.checks import UserError
from jax_huginn.visualization.charts import Axis, Bars, Chart, HeatMap, Lines

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ecf1",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "jax-huginn",  # the same file for the same chart
}
LINESTYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def write_plots(charts: Iterable[Chart], folder: Path) -> int:
    """Write every chart as KEY.png and KEY.svg; returns their number.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plots needs matplotlib: pip install -e '.[plots]'") from None
    from matplotlib.figure import Figure

    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            with matplotlib.rc_context(STYLE):
                figure = Figure(figsize=_size(chart), layout="constrained")
                axes = figure.subplots()
                axes.set_title(chart.title, loc="left")
                _draw(chart, axes)
                figure.savefig(folder / f"{chart.key}.png", dpi=200)
                figure.savefig(folder / f"{chart.key}.svg", metadata={"Date": None})
            count += 1
    except OSError as error:
        raise UserError(f"--plots {folder} cannot be written: {error.strerror}") from None
    return count


def _size(chart: Chart) -> tuple[float, float]:
    """Inches."""
    if isinstance(chart, HeatMap):
        return (max(5.2, 0.6 * len(chart.columns)) if chart.text else 5.2, max(2.6, 0.8 + 0.17 * len(chart.rows)))
    return 5.2, 3.0


@singledispatch
def _draw(chart: Chart, axes: Any) -> None:
    raise TypeError(type(chart))


@_draw.register
def _(chart: Lines, axes: Any) -> None:
    for series in chart.series:
        if series.hidden:
            continue
        style = {"color": series.colour, "linestyle": LINESTYLES[series.dash]}
        style |= {"linewidth": 0.6, "alpha": 0.35} if series.faint else {"linewidth": 1.4}
        style |= {"label": _plain(series.name) or None, "markersize": 3.5}
        style |= {"marker": "o" if "markers" in series.style else None}
        style |= {"linestyle": "none"} if series.style == "markers" else {}
        if series.error is not None and np.isfinite(series.error).any():
            axes.errorbar(series.x, series.y, yerr=series.error, capsize=2, **style)
        else:
            axes.plot(series.x, series.y, **style)
    for value, name in chart.marks:
        axes.axhline(value, color="#7b8794", linewidth=0.8, linestyle=":")
        axes.annotate(
            _plain(name), (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=7,
            color="#7b8794",
        )  # fmt: skip
    _finish(chart.x, chart.y, axes, any(series.name and not series.hidden for series in chart.series))


@_draw.register
def _(chart: Bars, axes: Any) -> None:
    for name, x, heights, tint in chart.groups:
        width = 0.9 * float(np.diff(x).min()) if x.size > 1 else 0.9
        axes.bar(x, heights, width, color=tint, alpha=0.85 if len(chart.groups) == 1 else 0.55, label=_plain(name))
    for value, name in chart.marks:
        axes.axvline(value, color="#7b8794", linewidth=0.8, linestyle=":")
        axes.annotate(
            _plain(name), (value, 1), xycoords=("data", "axes fraction"), ha="left", va="top", size=7, color="#7b8794"
        )
    _finish(chart.x, chart.y, axes, any(name for name, *_ in chart.groups))


@_draw.register
def _(chart: HeatMap, axes: Any) -> None:
    from jax_huginn.visualization.colour_scales import matplotlib_scale

    axes.grid(visible=False)
    rows, columns = chart.values.shape
    numeric = not isinstance(chart.columns[0], str) and columns > 1
    extent = (float(chart.columns[0]), float(chart.columns[-1])) if numeric else (-0.5, columns - 0.5)
    image = axes.imshow(
        chart.values, aspect="auto", origin="lower", vmin=chart.low, vmax=chart.high, interpolation="nearest",
        cmap=matplotlib_scale(chart.diverging), extent=(*extent, -0.5, rows - 0.5),
    )  # fmt: skip
    every = max(1, rows // 40)
    axes.set_yticks(range(0, rows, every), [_plain(row) for row in chart.rows[::every]])
    if not numeric:
        axes.set_xticks(range(columns), [_plain(str(column)) for column in chart.columns])
    for row, cells in enumerate(chart.text or []):
        for column, cell in enumerate(cells):
            dark = chart.values[row, column] > (chart.low + chart.high) / 2 and not chart.diverging
            axes.text(column, row, _plain(cell), ha="center", va="center", size=6, color="white" if dark else "black")
    axes.figure.colorbar(image, ax=axes, label=chart.scale, pad=0.01)
    axes.set(xlabel=chart.x.label, ylabel=chart.y.label)


def _finish(x: Axis, y: Axis, axes: Any, legend: bool) -> None:
    for name, axis in (("x", x), ("y", y)):
        getattr(axes, f"set_{name}label")(_plain(axis.label))
        if axis.log:
            getattr(axes, f"set_{name}scale")("log")
        if axis.zero:
            getattr(axes, f"set_{name}lim")(**{("left" if name == "x" else "bottom"): 0})
        if axis.ticks is not None:
            getattr(axes, f"set_{name}ticks")(list(axis.ticks), [f"{tick:g}" for tick in axis.ticks])
            getattr(axes, f"{name}axis").minorticks_off()
    if legend:
        axes.legend()


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
