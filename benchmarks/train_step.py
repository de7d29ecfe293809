"""A preset's full training step: seconds, tokens/s, MFU and memory, at given depths.

    python benchmarks/train_step.py --config configs/moe_3_8b.py --batch 1 --n 25 --k 8 --set model.remat=dots

One process measures one case, since peak memory is a process's.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks.common import median_seconds, override, peak_gigabytes, report
from jax_huginn.config.cli import load_preset
from jax_huginn.training.flops import peak_flops, training_flops
from jax_huginn.training.step import init_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1, help="sequences in one micro-batch")
    parser.add_argument("--n", type=int, default=25)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE")
    options = parser.parse_args()

    config = load_preset(options.config)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=options.batch, micro_batches=1)
    )
    config = override(config, options.set)
    state = jax.jit(lambda: init_state(config))()
    step = jax.jit(make_train_step(config), donate_argnums=0)
    rows = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (options.batch, config.train.sequence_length + 1)
    )
    rows = rows.astype(np.int32)
    depths = np.array([options.n], np.int32), np.array([options.k], np.int32)

    start = time.perf_counter()
    compiled = step.lower(state, rows[:, :-1], rows[:, 1:], *depths).compile()
    compile_seconds = time.perf_counter() - start
    inputs = jax.device_put((rows[:, :-1], rows[:, 1:], *depths))
    metrics = None

    def run():
        nonlocal state, metrics
        state, metrics = compiled(state, *inputs)
        return state

    seconds = median_seconds(run, options.repeats)
    assert metrics is not None
    assert np.isfinite(float(metrics.loss)), "the step's loss is not finite"
    tokens = options.batch * config.train.sequence_length
    flops = tokens * training_flops(config, options.n, options.k)
    peak = peak_flops(jax.devices()[0].device_kind)
    report(
        benchmark="train_step",
        config=Path(options.config).stem,
        settings=options.set,
        batch=options.batch,
        sequence_length=config.train.sequence_length,
        n=options.n,
        k=options.k,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        tflops=flops / seconds / 1e12,
        mfu=flops / seconds / peak if peak else None,
        peak_gb=peak_gigabytes(),
        compile_seconds=compile_seconds,
        loss=float(metrics.loss),
    )


if __name__ == "__main__":
    main()
