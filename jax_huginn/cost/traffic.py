"""What the devices tell each other in a step, as `parallel.mesh`, `parallel.expert` and `training.step` write it out.

The compiler may send less: it joins equal gathers, and moves gathers of weights out of the loop over micro-batches.
Sums of scalars, routing statistics and the clip norm are a few kilobytes and not counted.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jax_huginn.config.schema import Config
from jax_huginn.cost.activations import Activations
from jax_huginn.cost.devices import COLLECTIVE, Device
from jax_huginn.cost.memory import steps_with_gradient
from jax_huginn.cost.shapes import Array, Shapes, Sizes, along
from jax_huginn.parallel.mesh import AXES

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
ONE_WAY = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}
"""Times that a ring, or each device to each, sends the share of the others."""


@dataclass(frozen=True)
class Exchange:
    """One kind of collective, all of its calls in a step together."""

    what: str
    kind: Kind
    axes: tuple[str, ...]
    """The mesh axes along which devices exchange, each of several devices."""
    size: float
    """Bytes of the whole arrays on a device: what a gather gives, what a scatter or a sum takes."""

    def sent(self, sizes: Sizes) -> float:
        """Bytes that each device sends."""
        devices = along(sizes, self.axes)
        return ONE_WAY[self.kind] * self.size * (devices - 1) / devices

    def seconds(self, sizes: Sizes, device: Device, per_host: int) -> float:
        link = _bandwidth(self.axes, sizes, device, per_host)
        return self.sent(sizes) / (link * 1e9 * COLLECTIVE)


def step_traffic(config: Config, sizes: Sizes, shapes: Shapes, n: float) -> list[Exchange]:
    """All exchanges of one step whose micro-batches do n recurrences without gradient on average."""
    micro_batches = config.train.micro_batches
    found: dict[tuple[str, Kind, tuple[str, ...]], float] = {}

    def add(what: str, kind: Kind, axes: tuple[str, ...], size: float) -> None:
        axes = tuple(name for name in axes if along(sizes, (name,)) > 1)
        if axes and size:
            found[what, kind, axes] = found.get((what, kind, axes), 0) + size

    for array in shapes.compute:
        over, size = array.gathered_over(), micro_batches * array.gathered(sizes)
        twice = 2 if array.top == "wte" else 1  # embedding and head
        add("weights, forward", "all_gather", over, twice * size)
        if _again(config, array):
            add("weights, backward", "all_gather", over, size)
        add("gradients", "reduce_scatter", over, twice * size)
    for array in shapes.params:
        copies = tuple(name for name in AXES if name not in array.split)
        add("gradients of copies", "all_reduce", copies, array.part(sizes))
    for kind, size in _dispatch(config, sizes, n).items():
        add("tokens to experts", kind, ("expert",), micro_batches * size)
    return [Exchange(*key, size) for key, size in found.items()]


def _again(config: Config, array: Array) -> bool:
    """Whether the backward pass gathers it once more: what stands within a `jax.checkpoint`, as the core does not."""
    return config.compute.remat != "none" and array.top in ("prelude", "coda", "moe")


def _dispatch(config: Config, sizes: Sizes, n: float) -> dict[Kind, float]:
    """Bytes of a micro-batch's exchanges along the expert axis."""
    model, moe, parallel = config.model, config.moe, config.parallel
    devices, tokens = along(sizes, ("expert",)), Activations(config, sizes, True).tokens
    if not moe.experts:
        return {}
    itemsize = jnp.dtype(model.dtype).itemsize
    forward = backward = 1.0  # calls, and those of them with gradient
    if moe.placement == "core":
        k = steps_with_gradient(config)
        forward, backward = (n + k) * model.core_layers, k * model.core_layers
    again = backward if config.compute.remat != "none" else 0
    rows = tokens * model.width * itemsize
    if parallel.dispatch == "ring":
        routing = tokens * moe.active * 4  # int32 experts; float32 weights, as their gradients
        gathered = (forward + again) * (rows + 2 * routing) + backward * rows
        # The sum of the experts' answers is needed once more only where a block of the core comes after it.
        again_back = again if moe.placement == "core" else 0
        scattered = (forward + again_back + backward) * rows + backward * routing
        return {"all_gather": devices * gathered, "reduce_scatter": devices * scattered}
    if parallel.dispatch == "all_to_all":
        places = min(tokens, max(1, math.ceil(tokens * moe.active * parallel.capacity_factor / moe.experts)))
        rows = moe.experts * places * model.width * itemsize
    else:
        rows *= moe.active
    return {"all_to_all": 2 * (forward + again + backward) * rows}


def _bandwidth(axes: tuple[str, ...], sizes: Sizes, device: Device, per_host: int) -> float:
    """GB/s of each device in an exchange along these axes: that of NVLink within a host; across hosts the network's,
    of which those of a group that share a host use their adapters together."""
    strides = {name: math.prod(sizes[AXES.index(name) + 1 :]) for name in AXES}
    members = [0]
    for name in axes:
        members = [m + index * strides[name] for m in members for index in range(along(sizes, (name,)))]
    here = sum(member < per_host for member in members)
    if here == len(members):
        return device.nvlink_gbs
    return min(device.nvlink_gbs, here * device.network_gbs)
