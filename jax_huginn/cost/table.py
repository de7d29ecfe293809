"""Plans as text."""

import jax

from jax_huginn.cost.compiled import Compiled
from jax_huginn.cost.devices import Device
from jax_huginn.cost.plan import Plan
from jax_huginn.parallel.mesh import AXES


def table(plans: list[Plan]) -> str:
    """A line a plan, the first the best."""
    head = [*AXES, "micro_batches", "at once", "GB", "s/step", "hidden", "tokens/s", "MFU"]
    rows = [[*map(str, plan.sizes), *_figures(plan)] for plan in plans]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    note = "at once: sequences on a device; hidden: s/step if no exchange took any time; tokens/s, MFU: of s/step"
    return "\n".join([*lines, note])


def _figures(plan: Plan) -> list[str]:
    train = plan.config.train
    return [
        str(train.micro_batches),
        str(train.batch_size // train.micro_batches // plan.cluster.devices),
        f"{plan.memory.total / 1e9:.1f}",
        f"{plan.seconds:.2f}",
        f"{plan.hidden_seconds:.2f}",
        f"{plan.tokens / plan.seconds:.0f}",
        f"{100 * plan.mfu(plan.seconds):.1f} %",
    ]


def describe(plan: Plan) -> str:
    """All figures of one plan."""
    config, cluster, memory = plan.config, plan.cluster, plan.memory
    train = config.train
    sequences = train.batch_size // train.micro_batches // cluster.devices
    lines = [
        f"{plan.name()}: {cluster.hosts} x {cluster.per_host} {cluster.device.kind}, {plan.parameters / 1e9:.2f} B "
        f"parameters",
        f"a step: {train.batch_size} sequences of {train.sequence_length}, {sequences} at once on a device; "
        f"n {plan.depth[0]:.1f}, k {plan.depth[1]:.2f}; remat {config.compute.remat}{', unrolled' * _unrolled(plan)}",
        "",
        f"memory of a device at its fullest moment ({_MOMENTS[memory.moment]}), GB of 10^9 bytes",
        *_rows({kind: f"{size / 1e9:.2f}" for kind, size in (memory.kept | memory.temporary).items()}),
        *_rows({"sum": f"{memory.total / 1e9:.2f}", "of": f"{cluster.device.memory_gb:g}"}),
        "",
        "sent by a device in a step, GB",
    ]
    exchanges: dict[str, str] = {}
    for exchange in plan.traffic:
        sent = exchange.sent(plan.sizes) / 1e9
        seconds = exchange.seconds(plan.sizes, cluster.device, cluster.per_host)
        name = f"{exchange.what}: {exchange.kind} over {' x '.join(exchange.axes)}"
        exchanges[name] = f"{sent:.3f}  {seconds:.3f} s"
    lines += _rows(exchanges or {"nothing": ""})
    lines += ["", "time of a step, s"]
    lines += _rows({kind: f"{seconds:.3f}" for kind, seconds in plan.compute_seconds.items()})
    lines += _rows({"exchanges, assumed to overlap with nothing": f"{plan.exchange_seconds:.3f}"})
    lines += _rows({"sum": f"{plan.seconds:.3f}"})
    lines += [
        "",
        f"{plan.flops / 1e15:.3g} PFLOP a step; {plan.tokens / plan.seconds:.0f} tokens/s, "
        f"MFU {100 * plan.mfu(plan.seconds):.1f} %; {100 * plan.mfu(plan.hidden_seconds):.1f} % if every exchange were "
        "hidden",
    ]
    return "\n".join(lines)


def describe_compiled(compiled: Compiled, device: Device) -> str:
    """The compiler's account beside what the device has."""
    lines = [
        f"memory of a device by XLA's own account (jax {jax.__version__}), GB of 10^9 bytes",
        *_rows({"arguments: weights, moments, tokens, counts": f"{compiled.arguments / 1e9:.2f}"}),
        *_rows({"temporaries": f"{compiled.temporaries / 1e9:.2f}"}),
        *_rows({"sum": f"{compiled.total / 1e9:.2f}", "of": f"{device.memory_gb:g}"}),
    ]
    for kind, share in compiled.overlapped.items():
        lines.append(f"of the bytes of its {kind}s {100 * share:.0f} % may travel beside computation")
    if compiled.recomputed:
        lines.append(f"to stay within it XLA repeats {compiled.recomputed} instructions, which costs time")
    return "\n".join(lines)


_MOMENTS = {
    "head": "at the head",
    "recurrence": "in the core's backward pass",
    "end": "at the end of the backward pass",
}


def _unrolled(plan: Plan) -> bool:
    return plan.config.compute.unroll and plan.config.compute.remat != "full"


def _rows(cells: dict[str, str]) -> list[str]:
    return [f"  {name:<64}{cell:>10}".rstrip() for name, cell in cells.items()]
