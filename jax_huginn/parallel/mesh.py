"""The device mesh, values placed on it, and the collectives used within a step.

Axes: `data` replicates the state; `fsdp` splits it along the width; `expert` splits the routed experts and, along the
width, everything else. All three split the batch, so every device computes on its own sequences.

Loss and gradient run inside one `jax.shard_map` over the mesh: the program of one device, with explicit collectives.
The compiler's own partitioner would sum the core's gradient over the devices in every recurrence. Here each device sums
over its recurrences first, and one exchange follows. Outside a `shard_map` the collectives of this module return their
input, so the model also runs without a mesh.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_huginn.config.checks import ConfigError, require
from jax_huginn.config.schema import Config

AXES = ("data", "fsdp", "expert")
BATCH = PartitionSpec(AXES)
"""Sequences over all devices, in the order of the mesh."""
REPLICATED = PartitionSpec()


# ---- The mesh -------------------------------------------------------------------------------------------------------


def available_devices() -> list[Any]:
    """All `jax.Device`s of all processes.

    Raises:
        ConfigError: JAX finds none, as where JAX_PLATFORMS names what is not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a plugin is known but not installed
        asked = os.environ.get("JAX_PLATFORMS")
        reason = str(error).split(" (set JAX_PLATFORMS")[0] or "no backend"
        fix = f"JAX_PLATFORMS={asked} names what is not here: " if asked else ""
        raise ConfigError(
            f"JAX finds no device ({reason}); {fix}set JAX_PLATFORMS=cpu, or install JAX for your GPU"
        ) from None


def first_devices(count: int) -> list[Any]:
    """As many devices as `--parallel.data` asks for; -1: all. Raises ConfigError where there are fewer."""
    devices = available_devices()
    require(count > 0 or count == -1, f"--parallel.data {count} must be positive, or -1 for all")
    require(count <= len(devices), f"--parallel.data {count} is more than the {len(devices)} device(s) here")
    return devices[: count if count > 0 else len(devices)]


def replicated_on(devices: Sequence[Any]) -> Callable[[Any], Any]:
    """From a tree of arrays to shardings by which each of the devices holds all of it."""
    everywhere = NamedSharding(Mesh(np.array(devices), ("data",)), REPLICATED)
    return lambda tree: jax.tree.map(lambda _: everywhere, tree)


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.parallel` asks for, over all devices of all processes unless some are given.

    Devices of one process are neighbours, with `data` outermost, so that most traffic stays within a host.

    Raises:
        ConfigError: sizes that do not fit the devices or the model.
    """
    devices = sorted(devices or available_devices(), key=lambda device: (device.process_index, device.id))
    sizes = mesh_sizes(config, len(devices))
    require_fit(config, sizes)
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: Config, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, expert) whose product is `devices`, -1 filled in."""
    parallel = config.parallel
    sizes = [parallel.data, parallel.fsdp, parallel.expert]
    known = int(np.prod([size for size in sizes if size != -1]))
    asked = ", ".join(f"parallel.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        require(devices % known == 0, f"{asked}: {known} does not divide the {devices} device(s) there are")
        sizes[sizes.index(-1)] = devices // known
    else:
        require(known == devices, f"{asked} make {known} devices, there are {devices}: -1 takes the rest")
    data, fsdp, expert = sizes
    return data, fsdp, expert


def require_fit(config: Config, sizes: tuple[int, int, int]) -> None:
    """Raise a ConfigError, with the numbers, if the mesh cannot split this model or batch evenly."""
    _, fsdp, expert = sizes
    devices, train = int(np.prod(sizes)), config.train
    require(
        config.model.width % (fsdp * expert) == 0,
        f"model.width={config.model.width} must be divisible by parallel.fsdp x parallel.expert = {fsdp} x {expert}",
    )
    require(
        config.moe.experts % expert == 0,
        f"moe.experts={config.moe.experts} must be divisible by parallel.expert={expert}",
    )
    require(
        config.moe.experts > 0 or expert == 1,
        f"parallel.expert={expert} but moe.experts=0: a dense model is split by parallel.fsdp",
    )
    sequences = train.batch_size // train.micro_batches
    require(
        sequences % devices == 0,
        f"a micro-batch of {sequences} sequences (train.batch_size={train.batch_size} / train.micro_batches="
        f"{train.micro_batches}) must be divisible by the {devices} devices: train.micro_batches may be "
        f"{train.batch_size // devices} or a divisor of it"
        if train.batch_size % devices == 0
        else f"train.batch_size={train.batch_size} must be divisible by the {devices} devices",
    )


def describe(mesh: Mesh) -> str:
    """'mesh: data 2 x fsdp 2 x expert 2 on 8 devices, 1 process'."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = len({device.process_index for device in mesh.devices.flat})
    return f"mesh: {axes} on {_count(mesh.size, 'device')}, {_count(processes, 'process', 'processes')}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


# ---- Host values on the mesh ----------------------------------------------------------------------------------------


def replicated(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """A host value that is the same on every process, copied whole to every device."""
    return from_every_host(np.asarray(value), NamedSharding(mesh, REPLICATED))


def from_every_host(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One global array, sharded as asked, from an array that every process has whole."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


# ---- The program of one device --------------------------------------------------------------------------------------


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` as the program each device of the mesh runs on its shards."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def inside() -> bool:
    """Whether the program of one device of a mesh is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(AXES) <= set(mesh.manual_axes)


def device_count() -> int:
    """Number of devices in the mesh; 1 outside a `shard_map`."""
    return jax.sharding.get_abstract_mesh().size if inside() else 1


def device_index() -> jax.Array | int:
    """This device's index in the mesh, which is also the index of its shard of the batch."""
    return lax.axis_index(AXES) if inside() else 0


def batch_sum(x: Any) -> Any:
    """Sum over all devices of a value computed from each device's shard of the batch."""
    return lax.psum(x, several(AXES)) if device_count() > 1 else x


def batch_mean(x: Any) -> Any:
    """Mean over all devices; their shards of the batch are equally large."""
    return lax.pmean(x, several(AXES)) if device_count() > 1 else x


def all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Shards of all devices along these mesh axes, concatenated along a dimension."""
    axes = several(axes)
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's shard, along a dimension, of the sum over these mesh axes; the transpose of `all_gather`."""
    axes = several(axes)
    return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes with more than one device; XLA:CPU copies the data of a collective over a single one."""
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)
