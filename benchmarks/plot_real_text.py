"""Draw and tabulate the kept results on real text, for docs/experiments.md; needs matplotlib.

    python benchmarks/plot_real_text.py --out docs/real_text.png

Left: held-out bits per byte by recurrences, mean and range of the seeds of `results/real_text.jsonl`. Right: what exit
criteria of `results/text_exits.jsonl` spend and cost, for the first run there, beside a fixed number of recurrences.
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
DEPTHS = (1, 2, 3, 4, 6, 8, 16, 32)
NAMES = {
    "dense": "dense, sampled depth",
    "injection": "8 experts at the injection, sampled depth",
    "core": "8 experts in the core, sampled depth",
    "fixed": "dense, fixed depth of 9",
}
FORMS = {
    "kl <": "s",
    "kl-entropy <": "o",
    "kl-margin <": "^",
    "kl-rising <": "v",
    "not-falling <": "x",
    "latent-diff <": "D",
}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines, exits = (
        [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
        for name in ("real_text", "text_exits")
    )
    runs = [line for line in lines if line["benchmark"] == "real_text"]
    settings = {name: [run for run in runs if run["setting"] == name] for name in NAMES}
    settings = {name: each for name, each in settings.items() if each}
    differences = [line for line in lines if line["benchmark"] == "real_text_difference"]
    tables = [runs_table(runs), differences_table(differences), routing_table(runs), exits_table(exits)]
    print("\n\n".join(tables))

    figure, (curves, spent) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_curves(settings, curves)
    draw_exits(exits[0], spent)
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})
    print(f"\n{out}: {out.stat().st_size / 1000:.0f} kB, {len(runs)} runs")


def runs_table(runs: list[dict[str, Any]]) -> str:
    rows = [f"| run | parameters | {' | '.join(f'r = {r}' for r in DEPTHS)} | r = 1 less r = 8 |"]
    rows.append("|---" * (len(DEPTHS) + 3) + "|")
    for run in runs:
        cells = [f"{run['bits_per_byte'][r - 1]:.4f}" for r in DEPTHS]
        saved = f"{run['less_than_one_recurrence'][7]:.4f} ± {run['less_standard_error'][7]:.4f}"
        name = f"{run['setting']}, seed {run['seed']}"
        rows.append(f"| {name} | {run['parameters'] / 1e6:.1f} M | {' | '.join(cells)} | {saved} |")
    return "\n".join(rows)


def differences_table(lines: list[dict[str, Any]]) -> str:
    depths = [name for name in lines[0] if name[0] == "r" and name[1:].isdigit()]
    rows = [f"| less | {' | '.join(f'r = {name[1:]}' for name in depths)} |", "|---" * (len(depths) + 1) + "|"]
    for line in lines:
        cells = [
            f"{each['bits_per_byte']:+.4f} ± {each['standard_error']:.4f} "
            f"({', '.join(f'{value:+.3f}' for value in each['by_seed'])})"
            for each in (line[name] for name in depths)
        ]
        rows.append(f"| {line['of']} less {line['to']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def routing_table(runs: list[dict[str, Any]]) -> str:
    rows = [
        "| run | least and greatest share | entropy of the router, nats | specialisation by folder |",
        "|---|---|---|---|",
    ]
    for run in runs:
        if "routing" in run:
            found = run["routing"]
            shares = np.array(found["shares"])
            rows.append(
                f"| {run['setting']}, seed {run['seed']} | {shares.min():.3f}, {shares.max():.3f} "
                f"| {np.mean(found['entropy']):.2f} | {np.mean(found['specialisation']):.3f} |"
            )
    return "\n".join(rows)


def exits_table(lines: list[dict[str, Any]]) -> str:
    names = " | ".join(line["preset"] for line in lines)
    rows = [f"| criterion | {names} |", "|---" * (len(lines) + 1) + "|"]
    for rule in lines[0]["rules"]:
        cells = [
            f"{each['steps']:.1f}, {100 * each['to_limit']:.1f} %, {each['bits_per_byte']:.4f} "
            f"({each['bits_per_byte'] - each['fixed']:+.4f})"
            for each in (line["rules"][rule] for line in lines)
        ]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    full = [f"{line['limit']}, {line['bits_per_byte'][str(line['limit'])]:.4f}" for line in lines]
    rows.append(f"| none | {' | '.join(full)} |")
    return "\n".join(rows)


def draw_curves(settings: dict[str, list[dict[str, Any]]], axes: Any) -> None:
    for name, runs in settings.items():
        curves = np.array([run["bits_per_byte"] for run in runs])
        steps = np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.mean(0), label=NAMES[name])
        axes.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set(ylim=(1.0, 1.3), xlabel="recurrences", ylabel="held-out bits per byte", title="Linux sources, 41 M tokens")
    axes.legend(frameon=False, fontsize=8)


def draw_exits(line: dict[str, Any], axes: Any) -> None:
    fixed = {int(r): bits for r, bits in line["bits_per_byte"].items() if int(r) > 1}
    axes.plot(list(fixed), list(fixed.values()), color="0.6", label="fixed")
    for form, marker in FORMS.items():
        rules = [each for rule, each in line["rules"].items() if rule.startswith(form)]
        axes.plot(
            [each["steps"] for each in rules], [each["bits_per_byte"] for each in rules], marker, markersize=5,
            label=form.removesuffix(" <"), fillstyle="none",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    axes.set(
        xlabel="mean recurrences",
        ylabel="held-out bits per byte",
        title=f"exits, {line['preset'].replace('_', ', seed ')}",
    )
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_verb(main)
