"""python -m jax_huginn.plan --config FILE [--hosts H] [--gpus-per-host G] [--section.field value ...]: memory, traffic
and time of a training step on devices that need not be here, for the mesh given or the best ones found."""

import sys

from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, parse_config, run_verb
from jax_huginn.cost.devices import DEVICES, make_device

SHOWN = 5  # of the meshes found
CHOSEN = "--parallel.data", "--parallel.fsdp", "--parallel.expert"


def main() -> None:
    own, overrides = _split(sys.argv[1:])
    parser = OneLineParser(prog="python -m jax_huginn.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a preset; --section.field changes its fields")
    parser.add_argument("--hosts", type=int, default=1, help="hosts (1)")
    parser.add_argument("--gpus-per-host", type=int, default=1, help="devices of a host, linked by NVLink (1)")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="a known device, for what follows (h100)")
    parser.add_argument("--memory-gb", type=float, help="memory that a program may fill, 10^9 bytes")
    parser.add_argument("--memory-gbs", type=float, help="the memory's bandwidth, 10^9 bytes/s")
    parser.add_argument("--nvlink-gbs", type=float, help="a device's bandwidth within its host, one way, 10^9 bytes/s")
    parser.add_argument("--network-gbs", type=float, help="a device's share of its host's network, one way, likewise")
    parser.add_argument("--compile", action="store_true", help="have XLA compile the step too, and print its bytes")
    parser.add_argument("--n", type=float, help="mean recurrences without gradient (the sampler's)")
    parser.add_argument("--k", type=float, help="mean recurrences with gradient (the sampler's)")
    options = parser.parse_args(own)
    for name in ("hosts", "gpus_per_host"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")
    figures = {name: getattr(options, name) for name in ("memory_gb", "memory_gbs", "nvlink_gbs", "network_gbs")}
    device = make_device(options.device, **figures)
    config = parse_config(["--config", options.config, *overrides])

    # After parsing, so that --help and a mistyped option answer without waiting for JAX.
    import jax

    from jax_huginn.cost.compiled import compile_for
    from jax_huginn.cost.plan import Cluster, best_meshes, mean_depth, plan_mesh
    from jax_huginn.cost.table import describe, describe_compiled, table

    jax.config.update("jax_platforms", "cpu")  # a GPU that is here is left alone, and none is asked for
    n, k = mean_depth(config)
    depth = (n if options.n is None else options.n, k if options.k is None else options.k)
    require(depth[0] >= 0, f"--n {depth[0]:g} must not be negative")
    most = config.recurrence.backprop_depth
    require(0 < depth[1] <= most, f"--k {depth[1]:g} must lie in (0, recurrence.backprop_depth={most}]")
    cluster = Cluster(device, options.hosts, options.gpus_per_host)

    named = {word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in overrides if word[:2] == "--"}
    parallel = config.parallel
    if named & set(CHOSEN) or (parallel.data, parallel.fsdp, parallel.expert) != (-1, 1, 1):
        plan = plan_mesh(config, cluster, depth)
    else:
        plans = best_meshes(config, cluster, depth, any_micro_batches="--train.micro_batches" not in named)
        plan = plans[0]
        print(table(plans[:SHOWN]), end="\n\n")
    print(describe(plan), flush=True)
    if options.compile:
        compiled = compile_for(plan.config, cluster)
        print("", describe_compiled(compiled, device), sep="\n")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """This command's own arguments, and those of the config's fields: they have a dot in their names."""
    own, overrides = [], []
    target = own
    for word in arguments:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            target = overrides if "." in name else own
            if target is own:
                word = "=".join([name.replace("_", "-"), *value])
        target.append(word)
    return own, overrides


if __name__ == "__main__":
    run_verb(main)
