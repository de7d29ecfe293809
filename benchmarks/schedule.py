"""The schedule of `inference.batching` written out, without a model: what it runs for given steps, and for how long.

    python benchmarks/schedule.py --rows 48 --width 32 --recurrence-ms 1.3 --readout-ms 1.8

prints tokens/s by how many rows in one have to wait for a read-out, beside fixed depth with `width` rows.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from jax_huginn.config.cli import OneLineParser, run_verb

MOST = 32


class Run(NamedTuple):
    """What a schedule runs."""

    core_runs: int
    readouts: int
    computed: int
    """Row-recurrences, those of waiting and finished rows included."""

    def seconds(self, recurrence: float, readout: float) -> float:
        return self.core_runs * recurrence + self.readouts * readout


def simulate(steps: Sequence[Sequence[int]], width: int, one_in: int, every: int = 1) -> Run:
    """Decode rows whose tokens stop after `steps[row][i]` recurrences.

    Args:
        width: rows of a run of the core; those with the fewest tokens think, the first of equals.
        one_in: one in so many unfinished rows has to wait before a read-out, unless nobody can think on.
        every: recurrences between tests of the criterion.
    """
    rows = range(len(steps))
    made = [0 for _ in rows]
    thought = [0 for _ in rows]
    core_runs = readouts = 0
    while unfinished := [row for row in rows if made[row] < len(steps[row])]:
        thinking, waiting = set(unfinished), []
        while thinking and len(waiting) * one_in < len(unfinished):
            core_runs += every
            for row in sorted(thinking, key=lambda row: (made[row], row))[:width]:
                thought[row] += every
                if thought[row] >= steps[row][made[row]]:
                    thinking.remove(row)
                    waiting.append(row)
        readouts += 1
        for row in waiting:
            made[row] += 1
            thought[row] = 0
    return Run(core_runs, readouts, core_runs * width)


def scripted_steps(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Steps (rows, tokens), a mean of 12: a gamma distribution of shape 4, so a deviation of 6, rounded to 1..32."""
    drawn = np.random.default_rng(seed).gamma(4, 3, (rows, tokens))
    return np.clip(np.rint(drawn), 1, MOST).astype(np.int32)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="in flight (32)")
    parser.add_argument("--width", type=int, default=32, help="rows of a run of the core (32)")
    parser.add_argument("--tokens", type=int, default=63, help="of a row (63)")
    parser.add_argument("--recurrence-ms", type=float, default=1.0)
    parser.add_argument("--readout-ms", type=float, default=1.3, help="of prelude, coda, head and sampling")
    options = parser.parse_args()
    steps = scripted_steps(options.rows, options.tokens)
    fixed = options.width / (MOST * options.recurrence_ms + options.readout_ms) * 1e3
    for one_in in (1, 2, 3, 4, 6, 8, options.rows):
        run = simulate(steps.tolist(), options.width, one_in)
        speed = steps.size / run.seconds(options.recurrence_ms, options.readout_ms) * 1e3
        case = {"rows": options.rows, "width": options.width, "mean_steps": float(steps.mean()), "one_in": one_in}
        print(json.dumps({**case, **run._asdict(), "tokens_per_second": speed, "times_fixed_depth": speed / fixed}))


if __name__ == "__main__":
    run_verb(main)
