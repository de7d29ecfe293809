"""python -m jax_huginn.plan --config FILE [--hosts H] [--gpus-per-host G] [--section.field value ...]: predict memory,
exchanges and time of a training step on machines that need not be here. Of mesh, train.micro_batches and compute.remat,
what is not given is searched."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, parse_config, run_verb, split_options
from jax_huginn.cost.devices import DEVICES, make_device

if TYPE_CHECKING:
    from jax_huginn.config.schema import Config
    from jax_huginn.cost.plan import Plan
    from jax_huginn.cost.xla import Compiled

SHOWN = 5  # plans in the table
OPTIONS = {  # that fix what is searched otherwise
    "mesh": ("--parallel.data", "--parallel.fsdp", "--parallel.expert"),
    "micro_batches": ("--train.micro_batches",),
    "remat": ("--compute.remat", "--model.remat"),
}
FIGURES = {
    "peak_tflops": "dense bf16 peak, 10^12 FLOP/s",
    "memory_gb": "memory that a program may fill, 10^9 bytes",
    "memory_gbs": "the memory's bandwidth, 10^9 bytes/s",
    "nvlink_gbs": "bandwidth to the other devices of the host, one way, 10^9 bytes/s",
    "network_gbs": "a device's share of its host's network, one way, 10^9 bytes/s",
}


def main() -> None:
    own, overrides = split_options(sys.argv[1:])
    options = _parser().parse_args(own)
    config = parse_config(["--config", options.config, *overrides])

    # Imported here, so that --help and a mistyped option are answered without waiting for JAX.
    import jax

    from jax_huginn.cost.plan import Cluster, best_plans, mean_depth
    from jax_huginn.cost.xla import compile_for

    jax.config.update("jax_platforms", "cpu")  # leaves a GPU alone, and needs none
    device = make_device(options.device, **{name: getattr(options, name) for name in FIGURES})
    for name in ("hosts", "gpus_per_host"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")
    n, k = mean_depth(config)
    depth = (n if options.n is None else options.n, k if options.k is None else options.k)
    require(depth[0] >= 0, f"--n {depth[0]:g} must not be negative")
    most = config.recurrence.backprop_depth
    require(0 < depth[1] <= most, f"--k {depth[1]:g} must lie in (0, recurrence.backprop_depth={most}]")

    plans = best_plans(config, Cluster(device, options.hosts, options.gpus_per_host), depth, _open(config, overrides))
    if len(plans) > 1:
        print(table(plans[:SHOWN]), end="\n\n")
    print(describe(plans[0]), flush=True)
    if options.compile:
        print("", describe_compiled(compile_for(plans[0].config, plans[0].cluster), device.memory_gb), sep="\n")


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m jax_huginn.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a preset or a run's config.json; --section.field changes it"
    )
    parser.add_argument("--hosts", type=int, default=1, help="hosts (1)")
    parser.add_argument("--gpus-per-host", type=int, default=1, help="devices of a host, linked by NVLink (1)")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="a known device (h100), whose figures are")
    for name, text in FIGURES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"{text}; default: its data sheet's")
    parser.add_argument("--compile", action="store_true", help="also compile the step with XLA and print its memory")
    parser.add_argument("--n", type=float, help="mean recurrences without gradient; default: the sampler's")
    parser.add_argument("--k", type=float, help="mean recurrences with gradient; default: the sampler's")
    return parser


def _open(config: Config, overrides: list[str]) -> list[str]:
    """What is to be searched: what no option fixes, nor a mesh in the config file."""
    given = {word.split("=")[0] for word in overrides}
    fixed = {what for what, options in OPTIONS.items() if given & set(options)}
    parallel = config.parallel
    if (parallel.data, parallel.fsdp, parallel.expert) != (-1, 1, 1):
        fixed.add("mesh")
    return [what for what in OPTIONS if what not in fixed]


# ---- Text -----------------------------------------------------------------------------------------------------------


def table(plans: list[Plan]) -> str:
    """One line per plan."""
    head = ["data", "fsdp", "expert", "micro_batches", "remat", "at once", "GB", "s/step", "hidden", "tokens/s", "MFU"]
    rows = [head]
    for plan in plans:
        train = plan.config.train
        figures = [f"{plan.memory.total / 1e9:.1f}", f"{plan.seconds:.2f}", f"{plan.hidden_seconds:.2f}"]
        figures += [f"{plan.tokens / plan.seconds:.0f}", f"{100 * plan.mfu(plan.seconds):.1f} %"]
        choices = [*plan.sizes, train.micro_batches, plan.config.compute.remat, plan.sequences_at_once]
        rows.append([*map(str, choices), *figures])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    note = "at once: sequences on a device. hidden: s/step if all exchanges overlap with computation"
    return "\n".join([*lines, note])


def describe(plan: Plan) -> str:
    """All figures of one plan."""
    config, cluster, memory = plan.config, plan.cluster, plan.memory
    train, compute = config.train, config.compute
    unrolled = ", unrolled" * (compute.unroll and compute.remat != "full")
    exchanges = {}
    for each in plan.exchanges:
        seconds = each.seconds(plan.sizes, cluster.device, cluster.per_host)
        name = f"{each.what}: {each.kind} over {' x '.join(each.axes)}"
        exchanges[name] = f"{each.sent(plan.sizes) / 1e9:.3f}  {seconds:.3f} s"
    days = train.steps * plan.seconds / 86_400
    return "\n".join([
        f"{plan.name}{unrolled}: {cluster.hosts} x {cluster.per_host} {cluster.device.kind}, "
        f"{plan.parameters / 1e9:.2f} B parameters",
        f"a step: {train.batch_size} sequences of {train.sequence_length}, {plan.sequences_at_once} at once on a "
        f"device; n {plan.depth[0]:.1f}, k {plan.depth[1]:.2f}",
        "",
        "memory of a device at its fullest moment, GB of 10^9 bytes",
        *_rows({kind: f"{size / 1e9:.2f}" for kind, size in memory.kinds.items()}),
        *_rows({"sum": f"{memory.total / 1e9:.2f}", "of": f"{cluster.device.memory_gb:g}"}),
        "",
        "sent by a device in a step, GB",
        *_rows(exchanges or {"nothing": ""}),
        "",
        "time of a step, s",
        *_rows({kind: f"{seconds:.3f}" for kind, seconds in plan.compute_seconds.items()}),
        *_rows({"exchanges, assumed to overlap with nothing": f"{plan.exchange_seconds:.3f}"}),
        *_rows({"sum": f"{plan.seconds:.3f}"}),
        "",
        f"{plan.flops / 1e15:.3g} PFLOP a step; {plan.tokens / plan.seconds:.0f} tokens/s, MFU "
        f"{100 * plan.mfu(plan.seconds):.1f} %; {100 * plan.mfu(plan.hidden_seconds):.1f} % if all exchanges overlap",
        f"train.steps={train.steps} take {days:.3g} days, {24 * days * cluster.devices:.3g} GPU-hours, for "
        f"{train.steps * plan.tokens / 1e9:.3g} B tokens",
    ])  # fmt: skip


def describe_compiled(compiled: Compiled, memory_gb: float) -> str:
    """The compiler's account beside what the device has."""
    lines = [
        f"memory of a device as XLA compiles the step (jax {compiled.jax}), GB of 10^9 bytes",
        *_rows({"arguments: weights, moments, tokens, counts": f"{compiled.arguments / 1e9:.2f}"}),
        *_rows({"temporaries": f"{compiled.temporaries / 1e9:.2f}"}),
        *_rows({"sum": f"{compiled.total / 1e9:.2f}", "of": f"{memory_gb:g}"}),
    ]
    for kind, share in compiled.overlapped.items():
        lines.append(f"{100 * share:.0f} % of the bytes of its {kind}s may travel while the device computes")
    if compiled.recomputed:
        lines.append(f"XLA repeats {compiled.recomputed} instructions to fit, which costs time")
    return "\n".join(lines)


def _rows(cells: dict[str, str]) -> list[str]:
    return [f"  {name:<64}{cell:>10}".rstrip() for name, cell in cells.items()]


if __name__ == "__main__":
    run_verb(main)
