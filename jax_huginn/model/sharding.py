"""Sharding of parameters and their optimiser state over the mesh.

A weight is gathered where it is used (`gathered`); the transpose of the gather is a reduce-scatter of its gradient.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_huginn.model.parameters import parameter_of
from jax_huginn.parallel.mesh import AXES, all_gather, inside, several

# Mesh axes of each logical axis. An axis without a rule is not split. A mesh axis splits an array only once, which
# leaves `fsdp` for the width of a stack of experts. Norms and biases are replicated: they are 0.01 % of the weights,
# and gathering a small array costs mostly latency.
RULES: dict[str, tuple[str, ...]] = {"experts": ("expert",), "width": ("fsdp", "expert")}


def split_axes(path: Any, leaf: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of the array at a path.

    An optimiser's state for a parameter ends in the path of that parameter and is split like it. The optimiser's own
    fields, such as counters, are replicated.

    Raises:
        KeyError: the parameter is not in the table of `model.parameters`.
    """
    if not (path and isinstance(path[-1], jax.tree_util.DictKey)):  # a field of the optimiser, not a parameter
        return ((),) * len(leaf.shape)
    axes = parameter_of(path).axes
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


# ---- Within the program of one device -------------------------------------------------------------------------------


def gathered(params: Any) -> Any:
    """Whole weights from their shards on all devices; of a stack of experts, whole weights of this device's experts.

    The transpose sums the gradients over the devices that share a weight and leaves each its shard.
    """

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        for dimension, names in enumerate(split_axes(path, leaf)):
            if names != RULES["experts"]:
                leaf = all_gather(leaf, names, dimension)
        return leaf

    return jax.tree_util.tree_map_with_path(gather, params) if inside() else params


def summed_gradients(gradients: Any) -> Any:
    """Gradients of this device's shards, summed over the devices that hold copies of the same shards."""

    def add(path: Any, leaf: jax.Array) -> jax.Array:
        split = {name for names in split_axes(path, leaf) for name in names}
        copies = several(tuple(name for name in AXES if name not in split))
        return lax.psum(leaf, copies) if copies else leaf

    return jax.tree_util.tree_map_with_path(add, gradients) if inside() else gradients


@jax.custom_vjp
def shared(params: Any) -> Any:
    """The parameters as they are; backwards, `summed_gradients`. Each sum depends on its own gradient alone, so it can
    travel while the backward pass goes on."""
    return params


shared.defvjp(lambda params: (params, None), lambda _, gradients: (summed_gradients(gradients),))
