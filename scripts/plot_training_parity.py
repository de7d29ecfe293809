"""Draw twenty training steps in JAX and in Torch, and the difference between them, for docs/parity.md.

    python scripts/plot_training_parity.py --out docs/training_parity.png      # half a minute on two cores

The runs are those of parity_tests/training_runs.py: AdamW, MoE at the injection, sampled depths, two
micro-batches a step, clipping and schedule, in float64 and in float32.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError:
    sys.exit("error: plots need matplotlib: pip install -e '.[plots]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity_tests.support import LOSS_CURVE
from parity_tests.training_runs import Case, both_runs

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from jax_huginn.config.cli import OneLineParser, run_verb

COLOURS = {"float64": "tab:blue", "float32": "tab:orange"}


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    figure, (curves, differences) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for dtype, colour in COLOURS.items():
        ours, _, theirs, _ = both_runs(Case("adamw", dtype, micro_batches=2))
        steps = np.arange(1, len(ours["loss"]) + 1)
        if dtype == "float64":
            curves.plot(steps, theirs["loss"], "o", color="0.6", label="Torch")
            curves.plot(steps, ours["loss"], "-", color="k", label="JAX")
        for name, style in (("loss", "o"), ("grad_norm", "x")):
            error = np.abs(ours[name] - theirs[name]) / np.abs(theirs[name])
            label = f"{dtype}, {name.replace('grad_norm', 'gradient norm')}"
            error[error == 0] = np.nan  # equal to the last bit: no place on this axis
            differences.semilogy(steps, error, style, color=colour, label=label, markersize=5, fillstyle="none")
            print(f"{label}: largest relative difference {np.nanmax(error):.1e}")
        differences.axhline(LOSS_CURVE[dtype], color=colour, linestyle=":")
        differences.text(
            steps[-1], LOSS_CURVE[dtype] / 2, f"tolerance, {dtype}", ha="right", va="top", color=colour, size=8
        )
    curves.set(title="Loss (float64), nats per token")
    differences.set(title="Relative difference, JAX to Torch", ylim=(2e-17, 1e-2))
    for axes in (curves, differences):
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    differences.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.32))
    figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_verb(main)
