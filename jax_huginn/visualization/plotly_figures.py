"""Charts as plotly figures, for a page."""

from __future__ import annotations

from functools import singledispatch
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from jax_huginn.visualization.charts import Axis, Bars, Chart, HeatMap, Lines, Series
from jax_huginn.visualization.colour_scales import plotly_scale

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
INK, GRID, MARK = "#1f2933", "#e8ecf1", "#7b8794"


@singledispatch
def figure(chart: Chart) -> go.Figure:
    """The figure of a chart, without its title and note, which the page writes."""
    raise TypeError(type(chart))


@figure.register
def _(chart: Lines) -> go.Figure:
    drawn = go.Figure(layout=_layout(chart.x, chart.y))
    for series in chart.series:
        drawn.add_trace(_curve(series))
    for value, name in chart.marks:
        drawn.add_hline(
            value, line={"color": MARK, "width": 1, "dash": "dot"}, annotation_text=_shown(name),
            annotation_font={"size": 11, "color": MARK}, annotation_position="bottom right",
        )  # fmt: skip
    if chart.y.log and _decades(chart) > 2:  # or plotly labels the digits between the powers of ten
        drawn.update_yaxes(dtick=1)
    hovered = any(series.hover for series in chart.series)
    drawn.update_layout(hovermode="closest" if hovered else "x unified", height=chart.height)
    return _trimmed(drawn, any(series.name for series in chart.series))


def _decades(chart: Lines) -> float:
    """Powers of ten between the smallest and the largest positive value."""
    values = np.concatenate([series.y for series in chart.series])
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(values.max() / values.min())) if values.size else 0.0


def _curve(series: Series) -> go.Scatter:
    error = None
    if series.error is not None and np.isfinite(series.error).any():
        error = {"type": "data", "array": np.nan_to_num(series.error), "thickness": 1.2, "width": 4}
    return go.Scatter(
        x=series.x,
        y=series.y,
        name=_shown(series.name),
        mode=series.style,
        line={"color": series.colour, "width": 1 if series.faint else 2, "dash": series.dash},
        marker={"size": 5 if series.style == "markers" else 6},
        opacity=0.3 if series.faint else 1,
        error_y=error,
        text=series.hover,
        hovertemplate=_hover(series),
        hoverinfo="skip" if series.faint else None,
        showlegend=bool(series.name),
        visible="legendonly" if series.hidden else True,
    )


def _hover(series: Series) -> str | None:
    if series.faint:
        return None
    return "%{text}<extra></extra>" if series.hover else "%{y:.5g}"


@figure.register
def _(chart: Bars) -> go.Figure:
    drawn = go.Figure(layout=_layout(chart.x, chart.y))
    for name, x, heights, tint in chart.groups:
        drawn.add_trace(
            go.Bar(
                x=x,
                y=heights,
                name=_shown(name),
                marker={"color": tint, "line": {"width": 0}},
                opacity=0.85 if len(chart.groups) == 1 else 0.55,
                showlegend=bool(name),
                hovertemplate="%{x:.4g}: %{y:.3g}",
            )
        )
    for value, name in chart.marks:
        drawn.add_vline(
            value, line={"color": MARK, "width": 1, "dash": "dot"}, annotation_text=_shown(name),
            annotation_font={"size": 11, "color": MARK}, annotation_position="top",
        )  # fmt: skip
    drawn.update_layout(barmode="overlay", bargap=0.08, hovermode="closest")
    return _trimmed(drawn, bool(chart.marks) or any(name for name, *_ in chart.groups))


@figure.register
def _(chart: HeatMap) -> go.Figure:
    text = None if chart.text is None else [[_shown(cell) for cell in row] for row in chart.text]
    drawn = go.Figure(layout=_layout(chart.x, chart.y))
    drawn.add_trace(
        go.Heatmap(
            x=list(chart.columns),
            y=[_shown(row) for row in chart.rows],
            z=chart.values.round(5),
            zmin=chart.low,
            zmax=chart.high,
            colorscale=plotly_scale(chart.diverging),
            colorbar={"title": {"text": chart.scale, "side": "right"}, "thickness": 12, "outlinewidth": 0},
            text=text,
            texttemplate="%{text}" if text else None,
            textfont={"size": 11},
            customdata=chart.hover,
            hovertemplate="%{customdata}<extra></extra>" if chart.hover else "%{y}, %{x}: %{z}<extra></extra>",
            xgap=1 if text else 0,
            ygap=1 if text or len(chart.rows) <= 32 else 0,
        )
    )
    drawn.update_yaxes(type="category", gridcolor="rgba(0,0,0,0)", tickmode="linear" if len(chart.rows) <= 80 else None)
    drawn.update_xaxes(gridcolor="rgba(0,0,0,0)", type="category" if isinstance(chart.columns[0], str) else None)
    height = min(max(320, 110 + 22 * len(chart.rows)), 1600)
    return _trimmed(drawn.update_layout(height=height, hovermode="closest"), legend=False)


def _trimmed(drawn: go.Figure, legend: bool) -> go.Figure:
    """Without the room for a legend where there is none."""
    return drawn if legend else drawn.update_layout(margin_t=14)


def _layout(x: Axis, y: Axis) -> dict[str, Any]:
    return {
        "template": "none",
        "height": 320,
        "margin": {"l": 62, "r": 16, "t": 34, "b": 46},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#cbd2d9", "font": {"size": 12}},
        "modebar": {"bgcolor": "rgba(255,255,255,.8)", "color": "#b0bac5", "activecolor": "#0072b2"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "xaxis": _axis(x),
        "yaxis": _axis(y) | ({"rangemode": "tozero"} if y.zero else {}),
    }


def _axis(axis: Axis) -> dict[str, Any]:
    ticks = {} if axis.ticks is None else {"tickvals": list(axis.ticks), "ticktext": [f"{t:g}" for t in axis.ticks]}
    return {
        "title": {"text": _shown(axis.label), "standoff": 8},
        "type": "log" if axis.log else "linear",
        "gridcolor": GRID,
        "linecolor": "#9aa5b1",
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "#9aa5b1",
        "ticklen": 4,
        "automargin": True,
        "exponentformat": "power" if axis.log else "SI",
        **ticks,
    }


def _shown(text: str) -> str:
    """Text in which plotly finds no markup; it takes empty cells and rows for missing ones."""
    return escape(text, quote=False) or " "
