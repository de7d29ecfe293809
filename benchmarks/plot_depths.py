"""Draw a step's time against n and k from kept results, for docs/performance.md; needs matplotlib.

    python benchmarks/plot_depths.py --out docs/time_by_depth.png

Of `results/train_step.jsonl` it takes the newest lines of one commit, device and setting that hold several depths.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import matplotlib
except ImportError:
    sys.exit("error: plots need matplotlib: pip install -e '.[plots]'")

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jax_huginn.config.cli import OneLineParser, run_verb

RESULTS = Path(__file__).parent / "results/train_step.jsonl"


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    runs = [list(run) for _, run in groupby(lines, key=_setting)]
    run = [run for run in runs if len({(line["n"], line["k"]) for line in run}) > 2][-1]
    usual = max(line["k"] for line in run)
    figure, (by_n, by_k) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)

    n, seconds = np.array(sorted((line["n"], line["seconds"]) for line in run if line["k"] == usual)).T
    slope, start = np.polyfit(n, seconds, 1)
    by_n.plot(n, seconds, "o", color="k")
    by_n.plot(n, start + slope * n, "-", color="0.6", label=f"{start:.2f} s + {1000 * slope:.1f} ms n")
    by_n.set(title=f"k = {usual}", xlabel="n, recurrences without gradient", ylabel="s/step", ylim=(0, None))
    by_n.legend(frameon=False)
    print(f"largest distance from the line: {np.abs(start + slope * n - seconds).max() / seconds.min():.1%}")

    shallow = [line for line in run if line["n"] == 0]
    for written_out, marker in ((True, "o"), (False, "s")):
        points = [(line["k"], line["seconds"]) for line in shallow if (line["k"] == usual) == written_out]
        label = "the usual k, written out" if written_out else "a loop that recomputes"
        by_k.plot(*np.array(points).T, marker, color="k", fillstyle="full" if written_out else "none", label=label)
    by_k.set(title="n = 0", xlabel="k, recurrences with gradient", xlim=(0, usual + 1))
    by_k.legend(frameon=False)
    first = run[0]
    figure.suptitle(f"{first['config']}, {first['device']}, commit {first['commit']}", size=9)
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB, {len(run)} lines")


def _setting(line: dict) -> tuple:
    return line["config"], line["device"], line["commit"], tuple(line["settings"]), line.get("xla_flags", "")


if __name__ == "__main__":
    run_verb(main)
