"""What a chart shows, apart from the library that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Dash = Literal["solid", "dash", "dot", "dashdot"]
DASHES: tuple[Dash, ...] = ("solid", "dash", "dot", "dashdot")
# Okabe and Ito's colours without yellow, which is too light for lines: apart for the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
# Dark to light, for things that have an order, such as depths: matplotlib's viridis without its yellow end.
ORDERED = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962")


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def ordered_colour(index: int, count: int) -> str:
    """The colour of element `index` of an ordered list of `count`."""
    return ORDERED[round(index * (len(ORDERED) - 1) / max(count - 1, 1))]


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    """Drawn logarithmically at first; the page has a button for the other kind."""
    zero: bool = False
    """Whether 0 is always in sight."""
    ticks: Sequence[float] | None = None
    """Where the labels are; by default the library chooses."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    """Empty: not in the legend."""
    x: np.ndarray
    y: np.ndarray
    colour: str
    dash: Dash = "solid"
    error: np.ndarray | None = None
    """Standard errors of y, NaN where unknown."""
    faint: bool = False
    """Pale and thin: the noise behind a smoothed curve."""
    style: Literal["lines", "lines+markers", "markers"] = "lines"
    hover: Sequence[str] | None = None
    """Text of every point, in place of its numbers."""
    hidden: bool = False
    """On a page it appears by a click on its name; not in figures."""


@dataclass(frozen=True)
class Chart:
    """What all charts have."""

    key: str
    """Name of its files, and of its place on the page."""
    title: str
    note: str = field(default="", kw_only=True)
    """The text under it."""
    wide: bool = field(default=False, kw_only=True)
    """Takes the whole width of a page."""


@dataclass(frozen=True)
class Lines(Chart):
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[tuple[float, str]] = ()
    """Values of y with a name, drawn as thin lines across."""
    height: int = field(default=320, kw_only=True)
    """On a page, pixels."""


@dataclass(frozen=True)
class Bars(Chart):
    x: Axis
    y: Axis
    groups: Sequence[tuple[str, np.ndarray, np.ndarray, str]]
    """(name, x, heights, colour), drawn over each other."""
    marks: Sequence[tuple[float, str]] = ()
    """Values of x with a name."""


@dataclass(frozen=True)
class HeatMap(Chart):
    x: Axis
    y: Axis
    columns: Sequence[float] | Sequence[str]
    rows: Sequence[str]
    """From the bottom to the top."""
    values: np.ndarray
    """(rows, columns)"""
    scale: str
    """What the colour means."""
    low: float
    high: float
    diverging: bool = False
    """Blue below the middle of the scale and red above; otherwise pale to dark."""
    text: Sequence[Sequence[str]] | None = None
    """Written into the cells."""
    hover: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    charts: Sequence[Chart]
    intro: str = ""
