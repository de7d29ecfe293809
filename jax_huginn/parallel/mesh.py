"""The mesh of devices, which part of every array each of them holds, and what they tell each other about a batch.

Axes: `data` copies the state, `fsdp` splits it along the width, `expert` splits the routed experts and, along the
width, everything else. All three split the batch, so each device computes on its own sequences.

Loss and gradient of a micro-batch run inside one `jax.shard_map` over the mesh: the program of one device, with every
exchange written out. A weight is gathered where it is used (`gathered`), whose transpose scatters and adds its
gradient. The compiler's own partitioner would add up the core's gradient over the devices in every recurrence; here it
is added up on each device first and exchanged once. Outside of a `shard_map` the functions here change nothing, so the
model needs no mesh.
"""

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

# The one table of sharding: from a parameter's logical axes to mesh axes. An axis that stands nowhere is not split; a
# mesh axis splits an array once, so that of a stack of experts only `fsdp` is left for the width.
RULES: dict[str, tuple[str, ...]] = {"experts": ("expert",), "width": ("fsdp", "expert")}

# The logical axes of every parameter, by the last name of its path. Under `experts` a stack has one more axis in front.
# Norms and biases are whole on every device: 0.01 % of the weights, and an exchange costs a small array its latency.
LOGICAL_AXES = {
    "wte": ("vocabulary", "width"),
    "adapter": ("state_and_embedding", "width"),
    "w_qkv": ("width", "heads"),
    "w_out": ("heads", "width"),
    "w_fc": ("width", "hidden"),
    "w_proj": ("hidden", "width"),
    "router": ("width", "choices"),
    "w_gate": ("width", "hidden"),
    "w_up": ("width", "hidden"),
    "w_down": ("hidden", "width"),
    "qk_bias": ("queries_and_keys", "one", "heads", "head"),
    "weight": ("norm",),
}


# ---- The mesh -------------------------------------------------------------------------------------------------------


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.parallel` asks for, over all devices of all processes unless told otherwise.

    Devices of one process are neighbours, with `data` outermost: what talks most stays within a host.

    Raises:
        ConfigError: sizes that do not fit the devices or the model.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    sizes = mesh_sizes(config, len(devices))
    require_fit(config, sizes)
    if config.parallel.dispatch == "ragged" and devices[0].platform == "cpu":
        raise ConfigError("parallel.dispatch=ragged needs GPUs, XLA has no ragged_all_to_all on CPUs: use ring")
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
    """Refuse a mesh that cannot split this model or batch evenly, with the numbers."""
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


# ---- What each device holds -----------------------------------------------------------------------------------------


def split_axes(path: Any, leaf: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of the array at a path.

    Also of an optimiser's state: what is kept for a parameter lies under its path and is split like it; the rest
    (counters) is whole on every device.
    """
    names = [_name(entry) for entry in path]
    axes = LOGICAL_AXES.get(names[-1] if names else "")
    if axes is None:
        return ((),) * len(leaf.shape)
    if "experts" in names:
        axes = ("experts", *axes)
    if len(axes) != len(leaf.shape):
        raise ValueError(f"{jax.tree_util.keystr(path)} has shape {leaf.shape}, not the axes {axes}")
    used: set[str] = set()
    split = []
    for axis in axes:
        split.append(tuple(name for name in RULES.get(axis, ()) if name not in used))
        used |= set(split[-1])
    return tuple(split)


def specs(tree: Any) -> Any:
    """The `PartitionSpec` of every array of parameters or training state, concrete or abstract."""
    return jax.tree_util.tree_map_with_path(lambda *leaf: PartitionSpec(*split_axes(*leaf)), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every array of parameters or training state, concrete or abstract."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def replicated(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """A host value, the same on every process, whole on every device."""
    return from_every_host(np.asarray(value), NamedSharding(mesh, REPLICATED))


def from_every_host(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, as one global array of which each device gets its part."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _name(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", ""))))


# ---- The program of one device --------------------------------------------------------------------------------------


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` as the program that every device of the mesh runs on its part of the arrays."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def inside() -> bool:
    """Whether what is being traced is the program of one device of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(AXES) <= set(mesh.manual_axes)


def device_count() -> int:
    """Devices of the mesh, 1 outside of one."""
    return jax.sharding.get_abstract_mesh().size if inside() else 1


def device_index() -> jax.Array | int:
    """This device's place in the mesh, which is its place along the batch."""
    return lax.axis_index(AXES) if inside() else 0


def gathered(params: Any) -> Any:
    """The weights whole, from this device's part; of a stack of experts, this device's experts. The transpose adds the
    gradients of the devices that share a weight and leaves each its part."""

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        for dimension, names in enumerate(split_axes(path, leaf)):
            if names != RULES["experts"]:
                leaf = all_gather(leaf, names, dimension)
        return leaf

    return jax.tree_util.tree_map_with_path(gather, params) if inside() else params


def summed_gradients(gradients: Any) -> Any:
    """Gradients of this device's parts of the weights, added up over the devices that hold the same parts."""

    def add(path: Any, leaf: jax.Array) -> jax.Array:
        split = {name for names in split_axes(path, leaf) for name in names}
        copies = _several(tuple(name for name in AXES if name not in split))
        return lax.psum(leaf, copies) if copies else leaf

    return jax.tree_util.tree_map_with_path(add, gradients) if inside() else gradients


def batch_sum(x: Any) -> Any:
    """The sum over all devices of what each has of its part of the batch."""
    return lax.psum(x, _several(AXES)) if device_count() > 1 else x


def batch_mean(x: Any) -> Any:
    """The mean over all devices; each has an equal part of the batch."""
    return lax.pmean(x, _several(AXES)) if device_count() > 1 else x


def all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The parts of all devices along these mesh axes, one after the other along a dimension."""
    axes = _several(axes)
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's part of the sum over these mesh axes, cut along a dimension: the transpose of `all_gather`."""
    axes = _several(axes)
    return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x


def _several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the axes that have more than one device: XLA for CPUs copies through an exchange with oneself."""
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)
