"""Draw and tabulate the kept results on generated tasks, for docs/experiments.md; needs matplotlib.

    python benchmarks/plot_generated_tasks.py shell_game --out docs/shell_game.png
    python benchmarks/plot_generated_tasks.py products most_frequent --out docs/other_tasks.png

Every value is the mean over the dense runs of `results/TASK.jsonl`, a row of the picture for each task; the tables give
each run's own.
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

RESULTS = Path(__file__).parent / "results"
DRAWN = (4, 8, 12, 16, 24, 32)
COLUMNS = (1, 4, 8, 12, 16, 20, 24, 28, 32)
EXITS = ("exits", "exits_everywhere", "exits_after_prompt")
PRESET_MEAN = 8  # mean depth of the presets
CHANCE = {"shell_game": 1 / 5, "products": 1 / 6, "last_digit": 1 / 10, "most_frequent": 1 / 5}
UNITS = {"shell_game": "swaps", "products": "factors", "last_digit": "digits", "most_frequent": "letters"}
RULES = {"kl < 5e-4": ("KL < 5e-4", "s"), "kl-entropy < 5e-4, 0.3": ("KL < 5e-4 and entropy < 0.3 nat", "o")}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=UNITS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure, rows = plt.subplots(
        len(options.tasks), 3, figsize=(12, 3.6 * len(options.tasks)), layout="constrained", squeeze=False
    )
    preset: list[dict[str, Any]] = []
    for task, axes in zip(options.tasks, rows, strict=True):
        lines = [json.loads(line) for line in (RESULTS / f"{task}.jsonl").read_text().splitlines()]
        preset = [line for line in lines if name_of(line) == f"seed {line['seed']}"]
        tables = [accuracy_table(preset, UNITS[task]), comparison_table(lines, UNITS[task])]
        for field in EXITS:
            if with_exits := [line for line in lines if field in line]:
                tables.append(exits_table(with_exits, field))
        print("\n\n".join(tables))
        draw(preset, task, axes)
    seeds = ", ".join(str(line["seed"]) for line in preset)
    figure.suptitle(f"mean and range of seeds {seeds}; grey: difficulties of training", size=9)
    figure.savefig(options.out, dpi=90, pil_kwargs={"optimize": True})
    print(f"\n{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


def name_of(line: dict[str, Any]) -> str:
    """What differs from the preset, and the seed."""
    parts = [f"{line['experts']} experts"] if line["experts"] else []
    parts += ["no curriculum"] if not line["curriculum_rows"] else []
    parts += [f"mean depth {line['mean']}"] if line["mean"] != PRESET_MEAN else []
    return ", ".join([*parts, f"seed {line['seed']}"])


def at(line: dict[str, Any], values: list[float], difficulty: int) -> float:
    return values[line["difficulties"].index(difficulty)]


def accuracy_table(lines: list[dict[str, Any]], unit: str) -> str:
    """Accuracy, a row for each number of recurrences and a cell with every run's."""
    rows = [f"| r \\ {unit} ({' / '.join(map(name_of, lines))}) | {' | '.join(map(str, COLUMNS))} | all |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    for r in lines[0]["accuracy"]:
        cells = [
            *(" / ".join(f"{at(line, line['accuracy'][r], count):.2f}" for line in lines) for count in COLUMNS),
            " / ".join(f"{line['accuracy_by_r'][int(r) - 1]:.3f}" for line in lines),
        ]
        rows.append(f"| {r} | {' | '.join(cells)} |")
    return "\n".join(rows)


def comparison_table(lines: list[dict[str, Any]], unit: str) -> str:
    """Accuracy on trained and on all difficulties, a row for each run."""
    rows = [
        f"| run | 1-12 {unit}, r = 1 / 8 / 32 | 1-32 {unit}, r = 8 / 16 / 32 | 24 {unit}, r = 32 |",
        "|---|---|---|---|",
    ]
    for line in lines:
        trained = line["difficulties"].index(line["difficulty"]) + 1
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


def draw(lines: list[dict[str, Any]], task: str, axes: np.ndarray) -> None:
    curves, steps, right = axes
    trained, unit = lines[0]["difficulty"], UNITS[task]
    for each in (curves, right):
        each.axhline(CHANCE[task], color="0.7", linewidth=0.8, linestyle=":")
        each.set(ylim=(0, 1.03), ylabel="accuracy")

    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(DRAWN)))
    recurrences = [int(r) for r in lines[0]["accuracy"]]
    for count, colour in zip(DRAWN, colours, strict=True):
        runs = np.array([[at(line, line["accuracy"][str(r)], count) for r in recurrences] for line in lines])
        dashed = "-" if count <= trained else "--"
        curves.plot(recurrences, runs.mean(0), dashed, color=colour, label=f"{count} {unit}")
        curves.fill_between(recurrences, runs.min(0), runs.max(0), color=colour, alpha=0.15, linewidth=0)
    curves.set_xscale("log", base=2)
    ticks = [r for r in recurrences if r & (r - 1) == 0]
    curves.set_xticks(ticks, [str(r) for r in ticks])
    curves.set(title=f"{task.replace('_', ' ')}: trained on at most {trained} {unit}", xlabel="recurrences")
    curves.legend(frameon=False, fontsize=8, loc="lower right")

    for rule, (label, marker) in RULES.items():
        for panel, field in ((steps, "steps"), (right, "accuracy")):
            runs = np.array([line["exits"][rule][field] for line in lines])
            panel.plot(lines[0]["difficulties"], runs.mean(0), marker=marker, markersize=3, linewidth=1, label=label)
            panel.fill_between(lines[0]["difficulties"], runs.min(0), runs.max(0), alpha=0.15, linewidth=0)
    steps.set(title="recurrences until the exit", xlabel=unit, ylabel="executed recurrences", ylim=(0, None))
    right.set(title="accuracy with the exit", xlabel=unit)
    for panel in (steps, right):
        panel.axvspan(0, trained + 0.5, color="0.93", zorder=0)
        panel.set_xlim(0, 33)
    steps.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_verb(main)
