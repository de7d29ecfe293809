"""Results files of evaluations, and the run that each belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax_huginn.checkpoints.digest import files_of_weights
from jax_huginn.checkpoints.step_folders import CHECKPOINTS
from jax_huginn.config.checks import UserError
from jax_huginn.files import sha256_of
from jax_huginn.visualization.records import Run


class Score(NamedTuple):
    """One metric of one task."""

    depth: str
    """The depth, or the exit criterion."""
    task: str
    metric: str
    value: float
    error: float
    """Standard error, NaN where unknown."""
    used: float
    """Recurrences that a token used, mean."""
    computed: float
    """Recurrences that were computed for it, mean."""


@dataclass(frozen=True)
class Evaluation:
    """One results file."""

    name: str
    """The model, as the legend calls it."""
    scores: Sequence[Score]
    note: str = ""
    """What could not be checked about it."""


def read_results(file: Path, runs: Sequence[Run]) -> Evaluation:
    """Read a results file of one of the runs' checkpoints or of an export that lies in a run folder.

    Raises:
        UserError: it is no results file, or one of another model.
    """
    content = _content(file)
    name, note = _owner(file, content, runs)
    return Evaluation(name, _scores(file, content), note)


def read_baseline(file: Path) -> Evaluation:
    """Read a results file of any other model, which is called as its source."""
    content = _content(file)
    return Evaluation(model_name(Path(content["source"])), _scores(file, content))


def merged(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Files of the same model as one, as of depths and of exit criteria; apart where both have the same score."""
    found: dict[str, Evaluation] = {}
    for each in evaluations:
        name = each.name
        while name in found and _keys(found[name]) & _keys(each):
            name += "'"
        scores = [*found[name].scores, *each.scores] if name in found else each.scores
        found[name] = Evaluation(name, scores, each.note)
    return list(found.values())


def _keys(evaluation: Evaluation) -> set[tuple[str, str, str]]:
    return {(score.depth, score.task, score.metric) for score in evaluation.scores}


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"results file {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not a results file: it is not JSON") from None
    kinds = {"results": dict, "executed_steps": dict, "source": str, "weights_sha256": str}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} is not a results file of `evaluate --output`: it has no {key!r}")
    return content


def _owner(file: Path, content: dict[str, Any], runs: Sequence[Run]) -> tuple[str, str]:
    """The legend's name of the evaluated model, and what could not be checked."""
    source, digest = Path(content["source"]), content["weights_sha256"]
    for run in runs:
        for step in sorted((run.path / CHECKPOINTS).glob("[0-9]*")):
            if step.name.isdigit() and _digest(step) == digest:
                return f"{run.name} step {step.name}", ""
    for run in runs:
        if source.resolve().is_relative_to(run.path.resolve()):
            inner = f"step {source.name}" if source.parent.name == CHECKPOINTS else source.name
            if not source.exists():
                return f"{run.name} {inner}", f"{file}: {source} is gone, so its weights were not compared"
            if _digest(source) == digest:
                return f"{run.name} {inner}", ""
    names = " or ".join(str(run.path) for run in runs)
    raise UserError(
        f"results file {file} is of other weights than those of {names}: {source} (SHA-256 {digest[:12]}...); "
        "name its run, or give the file to --baseline"
    )


def _digest(source: Path) -> str | None:
    files = list(files_of_weights(source))
    return sha256_of(files) if all(each.is_file() for each in files) else None


def model_name(source: Path) -> str:
    """A model as legends call it: RUN/checkpoints/300 is "RUN step 300", any other source has its last name."""
    if source.parent.name == CHECKPOINTS:
        return f"{source.parent.parent.name} step {source.name}"
    return source.name


def _scores(file: Path, content: dict[str, Any]) -> list[Score]:
    scores = []
    for depth, tasks in content["results"].items():
        for task, metrics in tasks.items() if isinstance(tasks, dict) else []:
            used, computed = _steps(content["executed_steps"].get(depth), task)
            for key, value in metrics.items() if isinstance(metrics, dict) else []:
                name, comma, kind = key.partition(",")
                if not comma or name.endswith("_stderr") or _number(value) is None:
                    continue
                error = _number(metrics.get(f"{name}_stderr,{kind}"))
                metric = name if kind == "none" else f"{name} ({kind})"
                scores.append(
                    Score(depth, task, metric, float(value), math.nan if error is None else error, used, computed)
                )
    if not scores:
        raise UserError(f"results file {file} holds no score: no task has run")
    return scores


def _steps(executed: Any, task: str) -> tuple[float, float]:
    """Recurrences (used, computed): a number for a fixed depth, of an exit criterion {task: {"used", "computed"}}."""
    if isinstance(executed, dict):
        of_task = executed.get(task)
        found = of_task if isinstance(of_task, dict) else {}
        return float(_number(found.get("used")) or math.nan), float(_number(found.get("computed")) or math.nan)
    number = _number(executed)
    return (math.nan, math.nan) if number is None else (number, number)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
