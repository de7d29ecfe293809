"""python -m jax_huginn.report RUN [RUN2 ...] [--eval results.json ...]: draw runs as one HTML page.

The page needs no network. It is made from metrics.jsonl, config.json and the files that `evaluate --output` wrote,
without JAX.
"""

import sys
from pathlib import Path

from jax_huginn.config.checks import UserError
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.visualization import evaluation_charts, overview, run_charts
from jax_huginn.visualization.page import notices, write_page
from jax_huginn.visualization.paper import write_plots
from jax_huginn.visualization.records import Run, read_run
from jax_huginn.visualization.results import merged, read_baseline, read_results
from jax_huginn.visualization.thinning import POINTS


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.report", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    add("--eval", nargs="+", type=Path, default=[], metavar="FILE", help="results of checkpoints of these runs")
    add("--baseline", nargs="+", type=Path, default=[], metavar="FILE", help="results of any other models")
    add("--out", type=Path, metavar="FILE", help="the page (report.html in the first run folder)")
    add("--plots", type=Path, metavar="FOLDER", help="also write every chart there as PNG and SVG")
    options = parser.parse_args()
    report(options.runs, options.eval, options.baseline, options.out, options.plots)


def report(
    folders: list[Path], results: list[Path], baselines: list[Path], out: Path | None, plots: Path | None
) -> None:
    """Write the page and, into the folder `plots`, the figures; raises UserError for bad input."""
    runs = _read_runs(folders)
    evaluations = [read_results(file, runs) for file in results] + [read_baseline(file) for file in baselines]
    out = out or folders[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it")
    faults = [fault for run in runs for fault in run.faults] + [each.note for each in evaluations if each.note]
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    sections = run_charts.sections(runs)
    sections[1:1] = evaluation_charts.sections(merged(evaluations))
    lines = list(faults)
    if max(run.steps("step").size for run in runs) > POINTS:
        lines.append(
            f"A curve has at most {POINTS:,} points: where a run has more records, the smallest and the largest of "
            "every few are drawn. Means are taken over all records."
        )
    if missing := run_charts.missing(runs):
        lines.append(f"Not in these records: {'; '.join(missing)}.")
    tail = {"Differences": overview.differences(runs)} if len(runs) > 1 else {}
    tail["Configuration"] = overview.configuration(runs)
    head = overview.head(runs) + notices(lines)
    write_page(out, " and ".join(run.name for run in runs), head, sections, tail)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    if plots is not None:
        count = write_plots((chart for section in sections for chart in section.charts), plots)
        print(f"wrote {count} charts as PNG and SVG into {plots}")


def _read_runs(folders: list[Path]) -> list[Run]:
    """The runs, each under its folder's name, or the whole path where names repeat."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run folder is named twice")
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


if __name__ == "__main__":
    run_verb(main)
