"""Seconds of a training step by its FLOPs and bytes: FLOPs over a rate, bytes over a bandwidth.

The rates are shares of the data sheet's that the 3.8 B step reached on one H100 80GB, whose power limit then held it at
1.4 GHz (docs/performance.md). Tests compare the parts with that profile and the sum with other measured steps.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jax_huginn.config.schema import Config
from jax_huginn.cost.devices import Device
from jax_huginn.cost.memory import OUTER, Sizes, State, along, tokens_at_once
from jax_huginn.model.flops import core_has_moe, core_parts, forward_flops, moe_parts, outer_parts
from jax_huginn.model.recurrence import SUMMED_AT_ONCE
from jax_huginn.model.remat import KEPT
from jax_huginn.parallel.mesh import AXES

MATMUL = 720 / 989.4
FP8 = 1425 / 989.4  # of 8-bit matmuls
ATTENTION = 318 / 989.4  # cuDNN's, forward and backward together
MEMORY = 0.77  # of everything that is no matmul
COLLECTIVE = 0.8  # of a link's bandwidth; an assumption

BACKWARD = {"matmul": 2, "attention": 2.5, "elementwise": 2}  # work of a backward pass, over that of its forward pass
NEWTON_SCHULZ = 5  # iterations of Muon
LOGIT_BYTES = 16  # of float32 softmax and gradient, written and read


@dataclass(frozen=True)
class Work:
    """What one device does in a step."""

    matmul: float
    """FLOPs, recomputed ones counted."""
    fp8: float
    """FLOPs of 8-bit matmuls, which are none of `matmul`."""
    attention: float
    """FLOPs, likewise."""
    moved: float
    """Bytes read and written outside of matmuls: norms, RoPE, SwiGLU, sums of gradients, 8-bit scaling, optimiser."""

    def seconds(self, device: Device) -> dict[str, float]:
        return {
            "matmuls": (self.matmul / MATMUL + self.fp8 / FP8) / device.peak,
            "attention": self.attention / (ATTENTION * device.peak),
            "elementwise and optimiser": self.moved / (MEMORY * device.memory_gbs * 1e9),
        }


def step_work(config: Config, sizes: Sizes, state: State, n: float, k: float) -> Work:
    """A step whose micro-batches average n recurrences without gradient and k with."""
    model, train, remat = config.model, config.train, config.compute.remat
    outer, core = outer_parts(config, train.sequence_length), core_parts(config, train.sequence_length)
    ends = forward_flops(config, train.sequence_length)[0] - sum(part.flops for part in outer)  # head and adapter
    flops = {"matmul": 3 * ends, "attention": 0.0}
    for parts, runs, gradients in ((outer, 1, 1), (core, n + k, k)):
        for part in parts:
            kind = "attention" if part.name == "attention" else "matmul"
            backward = BACKWARD[kind] + (part.name not in KEPT[remat])
            flops[kind] += (runs + gradients * backward) * part.flops
    tokens = tokens_at_once(config, sizes) * train.micro_batches

    # Two norms and two norms of a sum (16 D with biases and RoPE), SwiGLU (3 of its hidden width).
    outer_blocks = model.prelude_layers + model.coda_layers
    forward, backward = (n + k) * model.core_layers + outer_blocks, k * model.core_layers + outer_blocks
    passes = forward + backward * (BACKWARD["elementwise"] + (remat != "none"))
    moved = passes * (16 * model.width + 3 * model.mlp_width) * jnp.dtype(model.dtype).itemsize
    fp8, scaled = _in_8_bits(config, n, k)
    moved = tokens * (moved + scaled + LOGIT_BYTES * model.vocab_size)
    moved += train.micro_batches * _sums_of_gradients(config, state, k) + _update(config, sizes, state)
    matmul = tokens * (flops["matmul"] - fp8) + _muon(sizes, state)
    return Work(matmul, tokens * fp8, tokens * flops["attention"], moved)


def _in_8_bits(config: Config, n: float, k: float) -> tuple[float, float]:
    """FLOPs of a token in 8-bit matmuls, and the bytes of scaling their operands and results: what goes in is read
    twice and written in 8 bits, what comes out is read and written once more. The weights' copies are not counted, nor
    the gradients of weights, which stay as they are."""
    if not config.compute.fp8:
        return 0.0, 0.0
    moe = moe_parts(config) if core_has_moe(config) else []
    itemsize, flops, moved = jnp.dtype(config.model.dtype).itemsize, 0.0, 0.0
    for part in core_parts(config, config.train.sequence_length):
        if part.name == "attention" or part in moe:
            continue
        forward = n + k * (1 + (part.name not in KEPT[config.compute.remat]))
        inputs, outputs = part.flops / 2 / part.result, part.result
        flops += (forward + k) * part.flops
        moved += (forward * inputs + k * outputs) * (2 * itemsize + 1) + (forward * outputs + k * inputs) * 2 * itemsize
    return flops, moved


def _sums_of_gradients(config: Config, state: State, k: float) -> float:
    """Bytes of adding up a micro-batch's gradients of the core: each is read, and the sum is read and written once for
    every few, or for each in a loop. A program written out starts without a sum."""
    unrolled = config.compute.unroll and config.compute.remat != "full"
    additions = math.ceil(config.recurrence.gradient_steps / SUMMED_AT_ONCE) if unrolled else k
    return state.core_gradient * (k + 2 * additions - unrolled)


def _update(config: Config, sizes: Sizes, state: State) -> float:
    """Bytes of a step's end: gradients are read by two norms and the update, moments and weights read and written, the
    copies to compute with written; with micro-batches, the sum of gradients is read and written for each."""
    weights, copies, moments = (
        sum(array.part(sizes) for array in arrays) for arrays in (state.weights, state.copies, state.moments)
    )
    count = config.train.micro_batches
    gradients, sums = (weights, count * (2 * weights + copies)) if count > 1 else (copies, 0)
    return 3 * gradients + 3 * weights + 2 * moments + copies + sums


def _muon(sizes: Sizes, state: State) -> float:
    """FLOPs of Muon's Newton-Schulz iterations, whose matrices are float32: TF32 runs at half of bfloat16's rate."""
    flops = 0.0
    for array in state.muon:
        short, long = sorted(array.shape[-2:])
        matrices = math.prod(array.shape[:-2]) / along(sizes, array.split)
        flops += matrices * NEWTON_SCHULZ * (4 * short**2 * long + 2 * short**3)
    return 2 * flops


# ---- Exchanges ------------------------------------------------------------------------------------------------------

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Exchange:
    """One kind of collective over one set of mesh axes, all of its calls in a step together."""

    what: str
    kind: Kind
    axes: tuple[str, ...]
    size: float
    """Bytes of the whole arrays on a device: the results of a gather, the operands of the others."""

    def sent(self, sizes: Sizes) -> float:
        """Bytes that each device sends."""
        devices = along(sizes, self.axes)
        return (2 if self.kind == "all_reduce" else 1) * self.size * (devices - 1) / devices

    def seconds(self, sizes: Sizes, device: Device, per_host: int) -> float:
        return self.sent(sizes) / (_bandwidth(self.axes, sizes, device, per_host) * 1e9 * COLLECTIVE)


def step_exchanges(config: Config, sizes: Sizes, state: State, n: float) -> list[Exchange]:
    """All exchanges of a step, as the program has them, whose micro-batches average n recurrences without gradient.

    The compiler may send less: it joins equal gathers and may gather weights once for all micro-batches. Scalars,
    routing statistics and the clip norm are a few kilobytes and not counted.
    """
    micro_batches = config.train.micro_batches
    found: dict[tuple[str, Kind, tuple[str, ...]], float] = {}

    def add(what: str, kind: Kind, axes: tuple[str, ...], size: float) -> None:
        axes = tuple(name for name in axes if along(sizes, (name,)) > 1)
        if axes and size:
            found[what, kind, axes] = found.get((what, kind, axes), 0) + size

    for array in state.copies:
        over, size = array.gathered_over, micro_batches * array.gathered(sizes)
        uses = 2 if array.names[0] == "wte" else 1  # embedding and head
        add("weights, forward", "all_gather", over, uses * size)
        if config.compute.remat != "none" and array.names[0] in OUTER:
            add("weights, backward", "all_gather", over, size)
        add("gradients", "reduce_scatter", over, uses * size)
    for array in state.copies if micro_batches == 1 else state.weights:  # the sum over micro-batches has their type
        copied = tuple(name for name in AXES if name not in array.split)
        add("gradients of copies", "all_reduce", copied, array.part(sizes))
    for kind, size in _dispatch(config, sizes, n).items():
        add("tokens to experts", kind, ("expert",), micro_batches * size)
    return [Exchange(*key, size) for key, size in found.items()]


def _dispatch(config: Config, sizes: Sizes, n: float) -> dict[Kind, float]:
    """Bytes of a micro-batch's exchanges along the expert axis."""
    model, moe, parallel = config.model, config.moe, config.parallel
    if not moe.experts:
        return {}
    devices, tokens = along(sizes, ("expert",)), tokens_at_once(config, sizes)
    forward = backward = 1.0  # calls
    if core_has_moe(config):
        k = config.recurrence.gradient_steps
        forward, backward = (n + k) * model.core_layers, k * model.core_layers
    again = backward if config.compute.remat != "none" else 0
    rows = tokens * model.width * jnp.dtype(model.dtype).itemsize
    if parallel.dispatch == "ring":
        routing = tokens * moe.active * 4  # int32 experts; float32 weights, and the gradients of these
        gathered = (forward + again) * (rows + 2 * routing) + backward * rows
        # The sum over the experts is recomputed only where a block of the core follows it.
        scattered = (forward + again * core_has_moe(config) + backward) * rows + backward * routing
        return {"all_gather": devices * gathered, "reduce_scatter": devices * scattered}
    slots = min(tokens, max(1, math.ceil(tokens * moe.active * parallel.capacity_factor / moe.experts)))
    rows *= moe.experts * slots / tokens
    return {"all_to_all": 2 * (forward + again + backward) * rows}


def _bandwidth(axes: tuple[str, ...], sizes: Sizes, device: Device, per_host: int) -> float:
    """10^9 bytes/s of each device: NVLink's within a host; across hosts the network's, where the members of a group
    that share a host use their adapters together."""
    strides = {name: math.prod(sizes[AXES.index(name) + 1 :]) for name in AXES}
    members = [0]
    for name in axes:
        members = [m + index * strides[name] for m in members for index in range(along(sizes, (name,)))]
    here = sum(member < per_host for member in members)
    return device.nvlink_gbs if here == len(members) else min(device.nvlink_gbs, here * device.network_gbs)
