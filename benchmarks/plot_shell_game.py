"""Draw and tabulate the kept results of shell game runs, for docs/experiments.md; needs matplotlib.

    python benchmarks/plot_shell_game.py --out docs/shell_game.png

Every value is the mean over the dense runs of `results/shell_game.jsonl`; the tables give each run's own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import matplotlib
except ImportError:
    sys.exit("error: plots need matplotlib: pip install -e '.[plots]'")

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jax_huginn.config.cli import OneLineParser, run_verb

RESULTS = Path(__file__).parent / "results/shell_game.jsonl"
SWAPS = (4, 8, 12, 16, 24, 32)
COLUMNS = (1, 4, 8, 12, 16, 20, 24, 28, 32)
EXITS = ("exits", "exits_everywhere", "exits_after_prompt")
PRESET_MEAN = 8  # mean depth of configs/shell_game.py
RULES = {"kl < 5e-4": ("KL < 5e-4", "s"), "kl-entropy < 5e-4, 0.3": ("KL < 5e-4 and entropy < 0.3 nat", "o")}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    preset = [line for line in lines if name_of(line) == f"seed {line['seed']}"]
    tables = [accuracy_table(preset), comparison_table(lines)]
    tables += [exits_table([line for line in lines if field in line], field) for field in EXITS]
    print("\n\n".join(tables))
    draw(preset, out)


def name_of(line: dict[str, Any]) -> str:
    """What differs from the preset, and the seed."""
    parts = [f"{line['experts']} experts"] if line["experts"] else []
    parts += ["no curriculum"] if not line["curriculum_rows"] else []
    parts += [f"mean depth {line['mean']}"] if line["mean"] != PRESET_MEAN else []
    return ", ".join([*parts, f"seed {line['seed']}"])


def at(line: dict[str, Any], values: list[float], swaps: int) -> float:
    return values[line["swaps"].index(swaps)]


def accuracy_table(lines: list[dict[str, Any]]) -> str:
    """Accuracy, a row for each number of recurrences and a cell with every run's."""
    rows = [f"| r \\ swaps ({' / '.join(map(name_of, lines))}) | {' | '.join(map(str, COLUMNS))} | all |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    for r in lines[0]["accuracy"]:
        cells = [
            *(" / ".join(f"{at(line, line['accuracy'][r], swaps):.2f}" for line in lines) for swaps in COLUMNS),
            " / ".join(f"{line['accuracy_by_r'][int(r) - 1]:.3f}" for line in lines),
        ]
        rows.append(f"| {r} | {' | '.join(cells)} |")
    return "\n".join(rows)


def comparison_table(lines: list[dict[str, Any]]) -> str:
    """Accuracy on trained and on all difficulties, a row for each run."""
    rows = [
        "| run | 1-12 swaps, r = 1 / 8 / 32 | 1-32 swaps, r = 8 / 16 / 32 | 24 swaps, r = 32 |",
        "|---|---|---|---|",
    ]
    for line in lines:
        trained = line["swaps"].index(line["difficulty"]) + 1
        short = " / ".join(f"{np.mean(line['accuracy'][r][:trained]):.3f}" for r in ("1", "8", "32"))
        every = " / ".join(f"{np.mean(line['accuracy'][r]):.3f}" for r in ("8", "16", "32"))
        rows.append(f"| {name_of(line)} | {short} | {every} | {at(line, line['accuracy']['32'], 24):.2f} |")
    return "\n".join(rows)


def exits_table(lines: list[dict[str, Any]], field: str) -> str:
    """Mean exit and accuracy, a row for each criterion and run."""
    head = f"| {field} | run | {' | '.join(map(str, COLUMNS))} | mean steps, accuracy | fixed r of that mean |"
    rows = [head, "|---" * (len(COLUMNS) + 4) + "|"]
    for rule in lines[0][field]:
        for line in lines:
            each = line[field][rule]
            cells = [f"{at(line, each['steps'], n):.1f} ({at(line, each['accuracy'], n):.2f})" for n in COLUMNS]
            fixed = line["accuracy_by_r"][round(each["mean_steps"]) - 1]
            rows.append(
                f"| {rule} | {name_of(line)} | {' | '.join(cells)} | {each['mean_steps']:.1f}, "
                f"{each['mean_accuracy']:.3f} | {fixed:.3f} |"
            )
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], out: Path) -> None:
    figure, (curves, steps, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    trained = lines[0]["difficulty"]
    for axes in (curves, right):
        axes.axhline(0.2, color="0.7", linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, 1.03), ylabel="accuracy")

    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(SWAPS)))
    recurrences = [int(r) for r in lines[0]["accuracy"]]
    for swaps, colour in zip(SWAPS, colours, strict=True):
        runs = np.array([[at(line, line["accuracy"][str(r)], swaps) for r in recurrences] for line in lines])
        dashed = "-" if swaps <= trained else "--"
        curves.plot(recurrences, runs.mean(0), dashed, color=colour, label=f"{swaps} swaps")
        curves.fill_between(recurrences, runs.min(0), runs.max(0), color=colour, alpha=0.15, linewidth=0)
    curves.set_xscale("log", base=2)
    ticks = [r for r in recurrences if r & (r - 1) == 0]
    curves.set_xticks(ticks, [str(r) for r in ticks])
    curves.set(title=f"trained on at most {trained} swaps", xlabel="recurrences")
    curves.legend(frameon=False, fontsize=8, loc="lower right")

    for rule, (label, marker) in RULES.items():
        for axes, field in ((steps, "steps"), (right, "accuracy")):
            runs = np.array([line["exits"][rule][field] for line in lines])
            axes.plot(lines[0]["swaps"], runs.mean(0), marker=marker, markersize=3, linewidth=1, label=label)
            axes.fill_between(lines[0]["swaps"], runs.min(0), runs.max(0), alpha=0.15, linewidth=0)
    steps.set(title="recurrences until the exit", xlabel="swaps", ylabel="executed recurrences", ylim=(0, None))
    right.set(title="accuracy with the exit", xlabel="swaps")
    for axes in (steps, right):
        axes.axvspan(0, trained + 0.5, color="0.93", zorder=0)
        axes.set_xlim(0, 33)
    steps.legend(frameon=False, fontsize=8)
    seeds = ", ".join(str(line["seed"]) for line in lines)
    figure.suptitle(f"shell game: mean and range of seeds {seeds}; grey: difficulties of training", size=9)
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})
    print(f"\n{out}: {out.stat().st_size / 1000:.0f} kB, {len(lines)} runs")


if __name__ == "__main__":
    run_verb(main)
