"""The table of parameters, by the last name of their path: sharding, optimiser group and compute type."""

from typing import Any, Literal, NamedTuple

import jax

from jax_huginn.ops import fp8
from jax_huginn.ops.norm import at_least_float32

Group = Literal["vector", "embedding", "router", "matrix", "expert stack"]


class Parameter(NamedTuple):
    """A kind of parameter."""

    axes: tuple[str, ...]
    """Logical axes, which `model.sharding` maps to mesh axes; a stack of experts has another one in front."""
    group: Group
    """The optimiser's group: vectors are not decayed, Muon updates matrices and expert stacks."""
    precise: bool = False
    """Cast to at least float32 whatever `model.dtype` is."""
    fp8: bool = False
    """Multiplied in 8-bit floats by the recurrences of a training step, if `compute.fp8` is set."""


PARAMETERS = {
    "wte": Parameter(("vocabulary", "width"), "embedding"),
    "adapter": Parameter(("state_and_embedding", "width"), "matrix", fp8=True),
    "w_qkv": Parameter(("width", "heads"), "matrix", fp8=True),
    "w_out": Parameter(("heads", "width"), "matrix", fp8=True),
    "w_fc": Parameter(("width", "hidden"), "matrix", fp8=True),
    "w_proj": Parameter(("hidden", "width"), "matrix", fp8=True),
    "router": Parameter(("width", "choices"), "router", precise=True),
    "w_gate": Parameter(("width", "hidden"), "matrix"),
    "w_up": Parameter(("width", "hidden"), "matrix"),
    "w_down": Parameter(("hidden", "width"), "matrix"),
    "qk_bias": Parameter(("queries_and_keys", "one", "heads", "head"), "vector"),
    "weight": Parameter(("norm",), "vector"),
}


def parameter_of(path: Any) -> Parameter:
    """The table's entry for the array at a path of `jax.tree_util`.

    Raises:
        KeyError: the name is not in the table.
    """
    names = names_of(path)
    if names[-1] not in PARAMETERS:
        raise KeyError(
            f"{jax.tree_util.keystr(path)}: parameter {names[-1]!r} is missing from the table of model/parameters.py"
        )
    kind = PARAMETERS[names[-1]]
    if "experts" not in names:
        return kind
    return kind._replace(axes=("experts", *kind.axes), group="expert stack")


def group_of(path: Any) -> Group:
    """The optimiser's group of the parameter at a path."""
    return parameter_of(path).group


def cast_params(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Parameters cast to `dtype`, the router's to at least float32."""
    precise = at_least_float32(dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(precise if parameter_of(path).precise else dtype), params
    )


def fp8_copies(params: Any) -> list[fp8.Copies | None]:
    """The 8-bit copies of the parameters that have such, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [fp8.copies_of(leaf) if parameter_of(path).fp8 else None for path, leaf in leaves]


def with_copies(params: Any, copies: list[fp8.Copies | None]) -> Any:
    """Parameters as `ops.fp8.matmul` takes them, each with its copies."""
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, copies, strict=True)
    return structure.unflatten([leaf if copy is None else fp8.Fp8Weight(leaf, copy) for leaf, copy in pairs])


def names_of(path: Any) -> list[str]:
    """The keys, attributes and indices along a path, as strings."""
    return [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path]
