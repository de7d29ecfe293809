"""Values and gradients of every dispatch to experts on several devices, against one device; a JSON line each.

    python benchmarks/dispatch.py --config configs/moe_700m.py --devices 2          # two GPUs
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/dispatch.py --config configs/moe.py \\
        --length 64                                                                 # a CPU that looks like two

One micro-batch, in float32 at the highest matmul precision; all_to_all gets room for every token, so nothing is
dropped. Errors are relative L2 distances: of the loss, of all gradients as one vector, and of the worst parameter.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.common import parse, report
from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config
from jax_huginn.model.sharding import shardings, specs
from jax_huginn.parallel.mesh import AXES, REPLICATED, make_mesh, per_device
from jax_huginn.training.step import init_params, make_gradient


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a preset; --section.field changes it")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence; one sequence on each device")
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--dispatches", nargs="*", default=["ring", "all_to_all"])
    options, overrides = parse(parser)
    require(options.devices <= jax.device_count(), f"--devices {options.devices}: there are {jax.device_count()}")
    jax.config.update("jax_default_matmul_precision", "highest")
    base = override(
        load_config(options.config),
        [
            *("--model.dtype", "float32", "--compute.attention", "xla", "--train.micro_batches", "1"),
            *("--train.batch_size", str(options.devices), "--train.sequence_length", str(options.length)),
            *("--recurrence.mean", str(options.n + options.k), "--recurrence.backprop_depth", str(options.k)),
            *overrides,
        ],
    )
    rows = np.random.default_rng(0).integers(0, base.model.vocab_size, (1, options.devices, options.length + 1))
    batch = (rows[..., :-1].astype(np.int32), rows[..., 1:].astype(np.int32))
    depth = (np.array([options.n], np.int32), np.array([options.k], np.int32), np.zeros(1, np.int32))
    reference = loss_and_gradients(base, 1, batch, depth)
    for dispatch in options.dispatches:
        words = ["--parallel.data", "1", "--parallel.expert", str(options.devices), "--parallel.dispatch", dispatch]
        config = override(base, [*words, "--parallel.capacity_factor", str(float(base.moe.experts))])
        loss, gradients = loss_and_gradients(config, options.devices, batch, depth)
        distance = {name: float(np.linalg.norm(gradients[name] - g)) for name, g in reference[1].items()}
        size = {name: float(np.linalg.norm(g)) for name, g in reference[1].items()}
        worst = max(distance, key=lambda name: distance[name] / max(size[name], 1e-30))
        report(
            benchmark="dispatch",
            config=Path(options.config).stem,
            settings=overrides,
            dispatch=dispatch,
            devices=options.devices,
            sequence_length=options.length,
            loss=loss,
            loss_error=abs(loss / reference[0] - 1),
            gradient_error=float(np.linalg.norm([*distance.values()]) / np.linalg.norm([*size.values()])),
            worst_parameter=worst,
            worst_error=distance[worst] / max(size[worst], 1e-30),
        )


def loss_and_gradients(config: Config, devices: int, batch: Any, depth: Any) -> tuple[float, dict[str, np.ndarray]]:
    """One micro-batch on a mesh of so many devices."""
    mesh = make_mesh(config, jax.devices()[:devices])
    abstract = jax.eval_shape(lambda: init_params(config))
    params = jax.jit(lambda: init_params(config), out_shardings=shardings(abstract, mesh))()
    split, in_order = specs(params), PartitionSpec(None, AXES)
    in_specs = (split, in_order, in_order, REPLICATED, REPLICATED, REPLICATED)
    run = jax.jit(per_device(make_gradient(config), mesh, in_specs, (split, REPLICATED, REPLICATED)))
    gradients, outputs, _ = run(params, *jax.device_put(batch, NamedSharding(mesh, in_order)), *depth)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(gradients))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    return float(outputs.log_ppl[0]), arrays


if __name__ == "__main__":
    run_verb(main)
