"""A preset's full training step: seconds, tokens/s, MFU and memory, at given depths (n, k) of one compilation.

    python benchmarks/train_step.py --config configs/moe_3_8b.py --compute.remat dots --compute.unroll true
    python benchmarks/train_step.py --config configs/moe_3_8b.py --depths 25,8 0,8 50,8 0,4 --cache FOLDER

With --devices the step runs on a mesh of that many, split as the config's section `parallel` says.

One process measures one case, since peak memory is a process's. `start_seconds` is the time from the start of
the process to the end of the first step, including Python's imports and the weights' initialisation; with --cache, a
second run of the same command shows a restart.
"""

import time

BEGAN = time.perf_counter()

import os
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.common import median_seconds, parse, peak_gigabytes, report
from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.model.flops import peak_flops, training_flops
from jax_huginn.parallel.mesh import BATCH, make_mesh
from jax_huginn.training.step import jit_train_step, make_state


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a preset; --section.field changes it")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch on each device")
    parser.add_argument("--devices", type=int, default=1, help="devices of the mesh")
    parser.add_argument("--micro-batches", type=int, default=1, help="of `batch` sequences each, all at one depth")
    parser.add_argument("--depths", nargs="*", default=["25,8"], metavar="N,K")
    parser.add_argument("--cache", help="folder of JAX's persistent compilation cache")
    parser.add_argument("--repeats", type=int, default=5)
    options, overrides = parse(parser)
    require(options.devices <= jax.device_count(), f"--devices {options.devices}: there are {jax.device_count()}")

    if options.cache:
        jax.config.update("jax_compilation_cache_dir", options.cache)
    sequences = options.batch * options.devices * options.micro_batches
    train = [f"--train.batch_size={sequences}", f"--train.micro_batches={options.micro_batches}"]
    config = override(load_config(options.config), [*train, *overrides])
    mesh = make_mesh(config, jax.devices()[: options.devices])
    state = make_state(config, mesh)
    step = jit_train_step(config, mesh)
    length, vocabulary = config.train.sequence_length, config.model.vocab_size
    rows = np.random.default_rng(0).integers(0, vocabulary, (sequences, length + 1)).astype(np.int32)
    batch = jax.device_put((rows[:, :-1], rows[:, 1:]), NamedSharding(mesh, BATCH))

    depths = [
        tuple(np.full(options.micro_batches, int(part), np.int32) for part in depth.split(","))
        for depth in options.depths
    ]
    start = time.perf_counter()
    compiled = step.lower(state, *batch, *depths[0]).compile()
    compile_seconds = time.perf_counter() - start
    state, metrics = compiled(state, *batch, *depths[0])
    jax.block_until_ready(state)
    start_seconds = time.perf_counter() - BEGAN

    for n, k in depths:

        def run(n: np.ndarray = n, k: np.ndarray = k):
            nonlocal state, metrics
            state, metrics = compiled(state, *batch, n, k)
            return state

        seconds = median_seconds(run, options.repeats)
        assert np.isfinite(float(metrics.loss)), "the step's loss is not finite"
        tokens = sequences * length
        flops = tokens * training_flops(config, int(n[0]), int(k[0]))
        peak = peak_flops(jax.devices()[0].device_kind)
        report(
            benchmark="train_step",
            config=Path(options.config).stem,
            settings=overrides,
            batch=options.batch,
            devices=options.devices,
            micro_batches=options.micro_batches,
            sequence_length=length,
            n=int(n[0]),
            k=int(k[0]),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            tflops=flops / seconds / 1e12,
            mfu=flops / seconds / peak / options.devices if peak else None,
            peak_gb=peak_gigabytes(),
            compile_seconds=compile_seconds,
            start_seconds=start_seconds,
            xla_flags=os.environ.get("XLA_FLAGS", ""),
            loss=float(metrics.loss),
        )


if __name__ == "__main__":
    run_verb(main)
