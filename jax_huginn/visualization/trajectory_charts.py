"""How each token of a prompt moves over the recurrences: distances, directions, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_huginn.visualization.charts import Axis, Chart, HeatMap, Lines, Section, Series, colour, ordered_colour

COLUMNS = 12  # recurrences whose predictions have room side by side
CELL = 11  # characters
PATHS = 12  # tokens whose paths are shown at once; the others wait in the legend
EXIT = 0.03  # default threshold of the exit criterion latent-diff


@dataclass(frozen=True)
class Trajectories:
    """One prompt at recurrences 1 to R; R recurrences, S positions, D width."""

    tokens: Sequence[str]
    """The text of every position."""
    states_RSD: np.ndarray
    entropy_RS: np.ndarray
    """Nats."""
    loss_RS: np.ndarray
    """Loss on the token that follows, nats; NaN at the last position."""
    top: Sequence[Sequence[Sequence[tuple[str, float]]]]
    """[recurrence][position]: (token, probability), the likeliest first."""

    @property
    def labels(self) -> list[str]:
        """A name for every position, no two alike."""
        return [f"{position} {_cut(token)}" for position, token in enumerate(self.tokens)]

    @property
    def depths(self) -> np.ndarray:
        return np.arange(1, len(self.states_RSD) + 1)


def sections(seen: Trajectories) -> list[Section]:
    return [
        Section("Predictions", [_predictions(seen), *_uncertainty(seen)], "What is read out of the state on the way."),
        Section("Convergence", _convergence(seen), "Where the states come to rest, and how fast."),
        Section("Paths", _paths(seen)),
    ]


def _predictions(seen: Trajectories) -> Chart:
    chosen = _spread(len(seen.depths))
    best = [[seen.top[r][s] for r in chosen] for s in range(len(seen.tokens))]
    hover = [
        [
            f"{label}, r = {r + 1}<br>"
            + "<br>".join(f"{probability:6.1%} {_visible(token)}" for token, probability in cell)
            for r, cell in zip(chosen, row, strict=True)
        ]
        for label, row in zip(map(_visible, seen.labels), best, strict=True)
    ]
    return HeatMap(
        "predictions", "Likeliest next token by recurrence", Axis("recurrence"), Axis(""),
        [str(r + 1) for r in chosen], seen.labels[::-1],
        np.array([[cell[0][1] for cell in row] for row in best])[::-1], "probability", 0.0, 1.0,
        text=[[_cut(cell[0][0]) for cell in row] for row in best][::-1], hover=hover[::-1], wide=True,
        note="A row is a position of the prompt, a cell the token that the model expects after it.",
    )  # fmt: skip


def _cut(text: str) -> str:
    """At most as much as a cell has room for."""
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _visible(text: str) -> str:
    """For hover texts, in which plotly finds markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _spread(count: int) -> list[int]:
    """Indices of at most `COLUMNS` recurrences, denser at the beginning, where most changes."""
    if count <= COLUMNS:
        return list(range(count))
    return sorted({round(x) - 1 for x in np.geomspace(1, count, COLUMNS)})


def _uncertainty(seen: Trajectories) -> list[Chart]:
    charts = []
    for key, title, values_RS, note in (
        ("loss", "Loss of the prompt's tokens", seen.loss_RS[:, :-1], "Cross-entropy of the token that follows."),
        ("entropy", "Entropy of the predictions", seen.entropy_RS, "How undecided the prediction is."),
    ):
        if values_RS.shape[1]:
            lines = _per_token(seen, values_RS)
            mean = Series("mean", seen.depths.astype(float), values_RS.mean(axis=1), colour(1), style="lines+markers")
            charts.append(
                Lines(f"{key}_by_recurrence", title, _recurrences(seen), Axis("nats"), [*lines, mean], note=note)
            )
    return charts


def _recurrences(seen: Trajectories) -> Axis:
    ticks = [2**power for power in range(len(seen.depths).bit_length())]
    return Axis("recurrence", log=True, ticks=ticks)


def _per_token(seen: Trajectories, values_RS: np.ndarray) -> list[Series]:
    x = seen.depths.astype(float)
    tints = [ordered_colour(s, values_RS.shape[1]) for s in range(values_RS.shape[1])]
    return [Series("", x, values_RS[:, s], tint, faint=True) for s, tint in enumerate(tints)]


def _convergence(seen: Trajectories) -> list[Chart]:
    norm_RS = np.linalg.norm(seen.states_RSD, axis=-1)
    last_S = np.maximum(norm_RS[-1], 1e-30)
    distance_RS = np.linalg.norm(seen.states_RSD - seen.states_RSD[-1], axis=-1) / last_S
    moved_RS = np.linalg.norm(np.diff(seen.states_RSD, axis=0), axis=-1) / np.maximum(norm_RS[1:], 1e-30)
    if len(seen.depths) < 2:
        return []
    logs_SR = np.log10(np.maximum(distance_RS[:-1].T, 1e-30))
    low, high = (float(np.percentile(logs_SR, q)) for q in (1, 99))
    hover = [
        [f"{_visible(label)}, r = {r + 1}<br>{10**value:.3g} of the last state's norm" for r, value in enumerate(row)]
        for label, row in zip(seen.labels, logs_SR, strict=True)
    ]
    steps = seen.depths[1:].astype(float)
    tints = [ordered_colour(s, len(seen.tokens)) for s in range(len(seen.tokens))]
    moves = [Series("", steps, moved_RS[:, s], tint, faint=True) for s, tint in enumerate(tints)]
    median = Series("median", steps, np.median(moved_RS, axis=1), colour(1), style="lines+markers")
    x = _recurrences(seen)
    norms = Series("median", seen.depths.astype(float), np.median(norm_RS, axis=1), colour(1), style="lines+markers")
    distance = HeatMap(
        "distance",
        "Distance to the last state",
        Axis("recurrence"),
        Axis(""),
        seen.depths[:-1].tolist(),
        seen.labels[::-1],
        logs_SR[::-1],
        "log10 of the distance",
        low,
        max(high, low + 1e-3),
        hover=hover[::-1],
        wide=True,
        note="||s_i - s_R|| / ||s_R|| for every token. Tokens that stay dark for long take longest to come to rest.",
    )
    moved = Lines(
        "moved",
        "Movement of one recurrence",
        x,
        Axis("", log=True),
        [*moves, median],
        [(EXIT, "latent-diff")],
        note=f"||s_i - s_(i-1)|| / ||s_i||; below {EXIT:g} the exit criterion latent-diff ends a token by default.",
    )
    norm = Lines("state_norm", "Norm of the state", x, Axis(""), [*_per_token(seen, norm_RS), norms], note="||s_i||.")
    return [distance, moved, norm]


def _paths(seen: Trajectories) -> list[Chart]:
    """The states' paths in the plane of their principal components."""
    away_RSD = (seen.states_RSD - seen.states_RSD[-1]).astype(np.float64)
    flat = away_RSD.reshape(-1, away_RSD.shape[-1])
    _, sizes, directions = np.linalg.svd(flat, full_matrices=False)
    variance = sizes**2 / max(float((sizes**2).sum()), 1e-30)
    place_RSP = away_RSD @ directions[:4].T
    charts = []
    for first, second in ((0, 1), (2, 3)):
        if len(sizes) <= second or variance[second] == 0:
            continue
        series = [
            Series(
                label, place_RSP[:, s, first], place_RSP[:, s, second], colour(s), style="lines+markers",
                hover=[f"{_visible(label)}, r = {r}" for r in seen.depths], hidden=s >= PATHS,
            )
            for s, label in enumerate(seen.labels)
        ]  # fmt: skip
        x, y = (Axis(f"component {i + 1} ({variance[i]:.0%} of the variance)") for i in (first, second))
        charts.append(
            Lines(
                f"paths_{first + 1}_{second + 1}",
                f"Principal components {first + 1} and {second + 1}",
                x,
                y,
                series,
                note="Positions are relative to the token's last state, so every path ends at the origin. A click on a "
                "name shows or hides its path, a double click shows it alone.",
                wide=True,
                height=460,
            )
        )
    return charts
