"""Depth-wise continuous batching: tokens/s at fixed depth, with exits in lockstep and with each row at its own pace.

    python benchmarks/batching.py                          # 3.5 B shape, bfloat16, r=32, context 256, on one H100
    python benchmarks/batching.py --batches 8 --cases fixed rows kl
    python benchmarks/batching.py --config configs/moe.py --batches 4 --context 96 --new 16   # a CPU

Weights are random, so tokens stop by a table of steps (`schedule.scripted_steps`, 12 of 32 in the mean). The cases,
each timed at its second run:

    fixed       all recurrences; at half the depth too, which gives the costs of a recurrence and of a read-out
    lockstep    a token waits until the slowest of its batch has stopped
    rows        rows at their own pace, read out when one in `--one-in` waits
    more        half as many rows again in flight, `batch` of which share a run of the core
    wider       half as many rows again, all in every run, and beside it the same at fixed depth
    kl          as rows, with `kl` tested every 1, 2 and 4 recurrences, coda and head each time; it decides nothing

`simulated` is what `schedule.simulate` says with the measured costs, `bound` what the memory's bandwidth does.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import numpy as np

from benchmarks.common import parse, peak_gigabytes, report
from benchmarks.generate import bound_of, random_model
from benchmarks.schedule import MOST, scripted_steps, simulate
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.inference import Exit, Schedule, Totals, generate
from jax_huginn.model.huginn import MoEHuginnModel

CASES = ("fixed", "lockstep", "rows", "more", "wider", "kl")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/huginn_3_5b.py", help="a preset; --section.field changes it")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--context", type=int, default=256, help="prompt and new tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens (64)")
    parser.add_argument("--one-in", type=int, default=Schedule().one_in)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES, help="fixed is always run")
    options, overrides = parse(parser)
    model = random_model(override(load_config(options.config), ["--model.dtype", "bfloat16", *overrides]))
    for batch in options.batches:
        measure(model, options, batch)


def measure(model: MoEHuginnModel, options: Any, batch: int) -> None:
    """All cases of one batch."""
    more = batch + batch // 2
    steps = scripted_steps(more, options.new)

    def case(name: str, rows: int, schedule: Schedule, limited: bool, costs: Any = None, **changes: Any) -> float:
        limits = steps[:rows] if limited else None
        totals = run(model, options, rows, schedule, limits, **changes)
        decoded = rows * (options.new - 1)  # the first new token comes from the prompt's logits
        speed, mean = decoded / totals.decode_seconds, totals.used / decoded
        simulated = None
        if costs is not None:
            expected = simulate(steps[:rows, 1:].tolist(), schedule.width or rows, schedule.one_in)
            assert expected == (totals.core_runs, totals.readouts, totals.computed)
            simulated = decoded / expected.seconds(*costs)
        report(
            benchmark="batching", config=options.config, case=name, batch=batch, rows=rows,
            width=schedule.width or rows, one_in=schedule.one_in, context=options.context, new_tokens=options.new,
            exit_every=changes["exit"].every if "exit" in changes else None, tokens_per_second=speed,
            simulated_tokens_per_second=simulated, share_of_simulation=simulated and speed / simulated,
            bound_tokens_per_second=bound_of(model.config, mean, rows, options.context), mean_steps=mean,
            computed_steps=totals.computed / decoded, core_runs=totals.core_runs, readouts=totals.readouts,
            cache_gb=totals.cache_bytes / 1e9, peak_gb=peak_gigabytes(),
        )  # fmt: skip
        return totals.decode_seconds / (options.new - 1)

    def costs_of(name: str, rows: int) -> tuple[float, float]:
        """Seconds of a recurrence and of prelude, coda, head and sampling."""
        half = case(name, rows, Schedule(), False, recurrence=MOST // 2)
        whole = case(name, rows, Schedule(), False)
        recurrence = (whole - half) / (MOST - MOST // 2)
        return recurrence, whole - MOST * recurrence

    costs, by_row = costs_of("fixed", batch), Schedule(one_in=options.one_in)
    if "lockstep" in options.cases:
        case("lockstep", batch, Schedule(one_in=1), True, costs)
    if "rows" in options.cases:
        case("rows", batch, by_row, True, costs)
    if "more" in options.cases:
        case("more", more, by_row._replace(width=batch), True, costs)
    if "wider" in options.cases:
        case("wider", more, by_row, True, costs_of("wider, fixed", more))
    for every in (1, 2, 4) if "kl" in options.cases else ():
        steps = np.minimum(-(-steps // every) * every, MOST)  # a token stops where it is tested
        case("kl", batch, by_row, True, exit=Exit("kl", min_steps=MOST + 1, every=every))


def run(
    model: MoEHuginnModel, options: Any, rows: int, schedule: Schedule, limits: np.ndarray | None, **changes: Any
) -> Totals:
    """What the second run of a case took."""
    rng, length = np.random.default_rng(0), options.context - options.new
    prompts = rng.integers(0, model.config.model.vocab_size, (rows, length)).tolist()
    arguments = {"max_new_tokens": options.new, "recurrence": MOST, "schedule": schedule, "limits": limits} | changes
    generate(model, prompts, **arguments)
    return generate(model, prompts, **arguments)[1]


if __name__ == "__main__":
    run_verb(main)
