"""The two scales of heat maps, for both libraries."""

from typing import Any

DIVERGING = ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b")
SEQUENTIAL = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")


def plotly_scale(diverging: bool) -> list[list[float | str]]:
    colours = DIVERGING if diverging else SEQUENTIAL
    return [[index / (len(colours) - 1), each] for index, each in enumerate(colours)]


def matplotlib_scale(diverging: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("scale", list(DIVERGING if diverging else SEQUENTIAL))
