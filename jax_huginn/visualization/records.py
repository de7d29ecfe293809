"""A run folder's records as columns."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jax_huginn.config.checks import UserError
from jax_huginn.reporting.record import metric_of

SHOWN = 5  # faulty lines that are named; all are counted


@dataclass
class Run:
    """The records and the configuration of a run."""

    name: str
    path: Path
    config: dict[str, Any]
    """"section.field" -> value, as config.json has it."""
    columns: dict[str, tuple[np.ndarray, list[Any]]]
    """Metric -> (steps, values)."""
    faults: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def steps(self, name: str) -> np.ndarray:
        return self.columns[name][0]

    def numbers(self, name: str) -> np.ndarray:
        """Float values of a metric, NaN and infinity included."""
        return np.array([float(value) for value in self.columns[name][1]])

    def family(self, metric: str) -> list[tuple[int, str]]:
        """(depth, name) of the run's metrics of the name `val_loss_r{r}`, by depth."""
        pattern = re.compile(metric.replace("{r}", r"(\d+)"), re.ASCII)
        return sorted((int(found[1]), name) for name in self.columns if (found := pattern.fullmatch(name)))

    @property
    def last_step(self) -> int:
        return int(self.steps("step")[-1])


def read_run(path: Path, name: str | None = None) -> Run:
    """Read metrics.jsonl and config.json.

    Lines that are no records are left out and named in `faults`. Of a step that is there twice the later one counts.

    Raises:
        UserError: the folder is no run, or holds no record.
    """
    file = path / "metrics.jsonl"
    if not path.is_dir():
        raise UserError(f"no run folder at {path}")
    if not file.is_file():
        what = "has no records yet" if (path / "config.json").is_file() else "is not a run folder"
        raise UserError(f"{path} {what}: there is no metrics.jsonl in it")
    try:
        records, bad = _parse(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not records:
        raise UserError(f"{path} has no records: none of the {len(bad)} lines of metrics.jsonl is one")
    config, faults = _config(path / "config.json")
    if bad:
        lines = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
        faults.append(f"{file}: {len(bad)} broken line{'s' * (len(bad) > 1)} left out (line {lines})")
    columns, unknown = _columns(records)
    if unknown:
        faults.append(f"{file}: unknown metrics left out: {', '.join(sorted(unknown))}")
    return Run(name or path.resolve().name, path, config, columns, faults)


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """Records in the order of their steps, and the numbers of the lines that are none."""
    records: dict[int, dict[str, Any]] = {}
    bad = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            records[_step(record)] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.append(number)
    return [records[step] for step in sorted(records)], bad


def _step(record: Any) -> int:
    step = record["step"]
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(step)
    return step


def _columns(records: list[dict[str, Any]]) -> tuple[dict[str, tuple[np.ndarray, list[Any]]], set[str]]:
    """The columns, and names that no metric has. Values of the wrong type are left out."""
    kept: dict[str, tuple[list[int], list[Any]]] = {}
    unknown: set[str] = set()
    for record in records:
        for name, value in record.items():
            if name in unknown:
                continue
            if name not in kept:
                try:
                    metric_of(name)
                except KeyError:
                    unknown.add(name)
                    continue
                kept[name] = ([], [])
            if _is_number(value) or (isinstance(value, list) and all(map(_is_number, value))):
                kept[name][0].append(record["step"])
                kept[name][1].append(value)
    return {name: (np.array(steps), values) for name, (steps, values) in kept.items() if steps}, unknown


def _is_number(value: Any) -> bool:
    """Numbers that JSON lacks are written as text: "nan", "inf"."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


def _config(file: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        sections = json.loads(file.read_text(encoding="utf-8"))
        return _flat(sections), []
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return {}, [f"{file} cannot be read ({type(error).__name__}): the page has no configuration"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
