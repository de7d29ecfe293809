"""How parameters, and the optimiser state that belongs to them, are sharded over the mesh.

A weight is gathered where it is used (`gathered`); the transpose scatters its gradient and adds it up.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_huginn.model.parameters import parameter_of
from jax_huginn.parallel.mesh import AXES, all_gather, inside, several

# From logical axes to mesh axes. An axis without a rule is not split; a mesh axis splits an array once, so a stack of
# experts has only `fsdp` left for its width. Norms and biases stay whole on every device: they are 0.01 % of the
# weights, and an exchange costs a small array its latency.
RULES: dict[str, tuple[str, ...]] = {"experts": ("expert",), "width": ("fsdp", "expert")}


def split_axes(path: Any, leaf: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of the array at a path.

    In an optimiser's state, what is kept for a parameter has that parameter's path at its end and is split like it.
    The optimiser's own fields, such as counters, are whole on every device.

    Raises:
        KeyError: a parameter that is not in the table of `model.parameters`.
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
    """Whole weights from this device's parts; of a stack of experts, the whole weights of this device's experts.

    The transpose adds up the gradients of the devices that share a weight and leaves each device its part.
    """

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
        copies = several(tuple(name for name in AXES if name not in split))
        return lax.psum(leaf, copies) if copies else leaf

    return jax.tree_util.tree_map_with_path(add, gradients) if inside() else gradients
