"""Weak scaling: a step on one device, then on several with as many sequences on each, on several meshes; JSON lines.

    python benchmarks/weak_scaling.py --config configs/moe_3_8b.py --devices 2 \
        --compute.remat dots --compute.unroll true
    python benchmarks/weak_scaling.py ... --meshes 1,2,1 --xla xla_gpu_enable_latency_hiding_scheduler=False

A mesh is data,fsdp,expert. `alone` is the step on the first device while the others rest, and `share_of_alone` a mesh's
tokens/s per device over its. Cards differ by some percent, and the slowest sets the pace of a mesh. All programs are
compiled at once, then run one after the other; `gb` is the compiler's account of a device's memory.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from benchmarks.common import median_seconds, parse, report
from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config
from jax_huginn.cost.xla import lower_step
from jax_huginn.model.flops import peak_flops, training_flops
from jax_huginn.parallel.mesh import AXES, BATCH, make_mesh
from jax_huginn.training.step import make_state


class Case(NamedTuple):
    """A step to measure."""

    name: str
    config: Config
    mesh: Mesh


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a preset; --section.field changes it")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch on each device")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--depth", default="25,8", metavar="N,K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--meshes", nargs="*", metavar="D,F,E", help="default: all devices along each axis")
    parser.add_argument("--xla", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the compiler")
    options, overrides = parse(parser)
    devices, count = jax.devices(), options.devices
    require(1 < count <= len(devices), f"--devices {count} must lie in [2, {len(devices)}], the devices that are here")
    depth = [np.full(options.micro_batches, int(part), np.int32) for part in options.depth.split(",")]

    def case(name: str, sizes: str, places: list[Any]) -> Case:
        words = [f"--train.batch_size={options.batch * options.micro_batches * len(places)}"]
        words += [f"--train.micro_batches={options.micro_batches}"]
        words += [f"--parallel.{axis}={size}" for axis, size in zip(AXES, sizes.split(","), strict=True)]
        config = override(load_config(options.config), [*words, *overrides])
        return Case(name, config, make_mesh(config, places))

    alone = case("alone", "1,1,1", devices[:1])
    meshes = options.meshes or [f"{count},1,1", f"1,{count},1", *[f"1,1,{count}"] * (alone.config.moe.experts > 0)]
    cases = [alone, *(case(sizes, sizes, devices[:count]) for sizes in meshes)]
    xla = dict(pair.split("=", 1) for pair in options.xla)
    with ThreadPoolExecutor() as pool:  # XLA compiles without holding Python's lock
        lowered = [lower_step(case.config, case.mesh) for case in cases]
        programs = list(pool.map(lambda one: one.compile(xla or None), lowered))

    tokens = options.batch * options.micro_batches * alone.config.train.sequence_length  # of a device
    flops = training_flops(alone.config, *(float(part[0]) for part in depth))
    peak = peak_flops(devices[0].device_kind)
    seconds_alone = 0.0
    for one, program in zip(cases, programs, strict=True):
        seconds, loss = run(one, program, depth, options.repeats)
        seconds_alone = seconds_alone or seconds
        memory = program.memory_analysis()
        report(
            benchmark="weak_scaling",
            config=Path(options.config).stem,
            settings=overrides,
            case=one.name,
            xla=xla,
            devices=one.mesh.size,
            batch=options.batch,
            micro_batches=options.micro_batches,
            n=int(depth[0][0]),
            k=int(depth[1][0]),
            seconds=seconds,
            tokens_per_second_and_device=tokens / seconds,
            mfu=tokens * flops / seconds / peak if peak else None,
            share_of_alone=seconds_alone / seconds,
            gb=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
            loss=loss,
        )


def run(case: Case, program: Any, depth: list[np.ndarray], repeats: int) -> tuple[float, float]:
    """Seconds of a case's compiled step, and the last loss."""
    train, vocabulary = case.config.train, case.config.model.vocab_size
    rows = np.random.default_rng(0).integers(0, vocabulary, (train.batch_size, train.sequence_length + 1))
    rows = rows.astype(np.int32)
    batch = jax.device_put((rows[:, :-1], rows[:, 1:]), NamedSharding(case.mesh, BATCH))
    state: Any = make_state(case.config, case.mesh)
    metrics: Any = None

    def step() -> Any:
        nonlocal state, metrics
        state, metrics = program(state, *batch, *depth)
        return state

    seconds = median_seconds(step, repeats)
    return seconds, float(metrics.loss)


if __name__ == "__main__":
    run_verb(main)
