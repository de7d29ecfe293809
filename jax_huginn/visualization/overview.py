"""The head and the tail of a report: figures at a glance, what was left out, the configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from jax_huginn.visualization.charts import colour
from jax_huginn.visualization.page import table
from jax_huginn.visualization.records import Run


def head(runs: Sequence[Run]) -> str:
    """The runs' figures at a glance, as HTML."""
    several = len(runs) > 1
    lines = [f"<h1>{escape(' and '.join(run.name for run in runs))}</h1>"]
    for place, run in enumerate(runs):
        cards = "".join(
            f'<div class="card{" warn" if warn else ""}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
            for value, label, warn in _cards(run)
        )
        dot = f'<span class="dot" style="background:{colour(place)}"></span>' if several else ""
        title = f"<h3>{dot}{escape(run.name)}</h3>" if several else ""
        shape = f'<p class="soft">{escape(_shape(run))}</p>'
        lines.append(f'<div class="run">{title}{shape}<div class="cards">{cards}</div></div>')
    return "\n".join(lines)


def _shape(run: Run) -> str:
    """The model and its training in one line; empty where the configuration is unknown."""
    get = run.config.get
    if not run.config:
        return ""
    blocks = "/".join(str(get(f"model.{name}_layers")) for name in ("prelude", "core", "coda"))
    experts = get("moe.experts", 0)
    routed = f"{experts} experts, top {get('moe.active')}" if experts else "dense"
    return (
        f"width {get('model.width')}, prelude/core/coda {blocks}, {routed}, mean depth {get('recurrence.mean')}, "
        f"{get('train.batch_size')} x {get('train.sequence_length')} tokens a step, {get('optimizer.name')}"
    )


def _cards(run: Run) -> Iterator[tuple[str, str, bool]]:
    """(figure, what it is, whether it is a warning)"""
    planned = run.config.get("train.steps")
    yield f"{run.last_step:,}", "steps" + (f" of {planned:,}" if isinstance(planned, int) else ""), False
    if "tokens" in run:
        yield _short(run.numbers("tokens")[-1]), "training tokens", False
    if "loss" in run:
        losses = run.numbers("loss")[-max(1, min(100, run.steps("loss").size // 20)) :]
        label = "training loss" + (f", mean of the last {losses.size}" if losses.size > 1 else "")
        yield f"{losses.mean():.4f}", label, not np.isfinite(losses).all()
    for pattern, unit in (("val_loss_r{r}", "nats/token"), ("val_bpb_r{r}", "bits/byte")):
        found = [(run.numbers(name)[-1], depth) for depth, name in run.family(pattern)]
        if found:
            best, depth = min(found)
            yield f"{best:.4f}", f"held-out {unit} at r = {depth}", False
    if found := [(run.numbers(name)[-1], depth) for depth, name in run.family("val_accuracy_r{r}")]:
        best, depth = max(found)
        yield f"{100 * best:.1f} %", f"held-out accuracy at r = {depth}", False
    if "tokens_per_second" in run:
        yield _short(float(np.median(run.numbers("tokens_per_second")))), "tokens/s, median", False
    if "mfu" in run:
        yield f"{100 * float(np.median(run.numbers('mfu'))):.1f} %", "MFU, median", False
    if "peak_memory_gb" in run:
        yield f"{run.numbers('peak_memory_gb').max():.1f} GB", "peak memory of a device", False
    skipped = int(run.numbers("skipped_updates")[-1]) if "skipped_updates" in run else 0
    if skipped or "non_finite" in run:
        yield f"{skipped:,}", "updates skipped, loss or gradient not finite", True
    for name, what in (("router_collapse_warning", "collapsed"), ("low_expert_diversity_warning", "half unused")):
        if name in run and (times := int(run.numbers(name).sum())):
            yield f"{times:,}", f"logged steps with the router {what}", True


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{number:,.0f}"


# ---- Configuration --------------------------------------------------------------------------------------------------


def differences(runs: Sequence[Run]) -> str:
    """A table of the fields in which the configurations differ, as HTML."""
    rows = [
        [name, *(_text(run.config.get(name)) for run in runs)]
        for name in _names(runs)
        if name != "run_dir" and len({_text(run.config.get(name)) for run in runs}) > 1
    ]
    return table(rows, ["field", *(run.name for run in runs)]) if rows else '<p class="soft">None.</p>'


def configuration(runs: Sequence[Run]) -> str:
    """All fields, a table for every section, as HTML."""
    groups: dict[str, list[list[str]]] = {}
    for name in _names(runs):
        section, _, field = name.rpartition(".")
        groups.setdefault(section, []).append([field, *(_text(run.config.get(name)) for run in runs)])
    tables = [
        table(rows, [section or "run", *(run.name if len(runs) > 1 else "" for run in runs)],
              [number for number, (_, *values) in enumerate(rows) if len(set(values)) > 1])
        for section, rows in groups.items()
    ]  # fmt: skip
    return f'<div class="columns" style="margin-top:12px">{"".join(tables)}</div>'


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.config))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
