"""The arrays of a training state and how a mesh cuts them, without allocating any.

`whole` and `part` are bytes of an array on one device: not split at all, and split as `parallel.mesh` says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.parameters import cast_params, names_of
from jax_huginn.model.sharding import RULES, split_axes
from jax_huginn.parallel.mesh import AXES
from jax_huginn.training.optimizer import make_optimizer

Sizes = tuple[int, int, int]
"""Devices along (data, fsdp, expert)."""


@dataclass(frozen=True)
class Array:
    """One array of a state."""

    top: str
    """First name of its path: wte, prelude, moe, norm_moe, adapter, core, coda or norm_f."""
    layer: str
    """What is gathered together: the first two names of a block's path, the first of others."""
    elements: int
    itemsize: int
    split: tuple[str, ...]
    """Mesh axes that split it."""
    expert_stack: bool

    @property
    def whole(self) -> int:
        return self.elements * self.itemsize

    def part(self, sizes: Sizes) -> int:
        return self.whole // along(sizes, self.split)

    def gathered_over(self) -> tuple[str, ...]:
        """Mesh axes whose parts are put together where the array is used: not those that split a stack of experts."""
        return tuple(name for name in self.split if not (self.expert_stack and name in RULES["experts"]))

    def gathered(self, sizes: Sizes) -> int:
        """Bytes on a device once gathered."""
        return self.part(sizes) * along(sizes, self.gathered_over())


@dataclass(frozen=True)
class Shapes:
    """All arrays of a step's state."""

    params: list[Array]
    """Master weights, in `model.param_dtype`."""
    compute: list[Array]
    """The same weights in the type in which they compute and in which their gradients come."""
    optimizer: list[Array]

    @property
    def parameters(self) -> int:
        return sum(array.elements for array in self.params)


def state_shapes(config: Config) -> Shapes:
    _, params = abstract_model(config)
    compute = jax.eval_shape(lambda params: cast_params(params, config.model.dtype), params)
    optimizer = jax.eval_shape(make_optimizer(config).init, params)
    return Shapes(*(_arrays(tree) for tree in (params, compute, optimizer)))


def _arrays(tree: Any) -> list[Array]:
    return [_array(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _array(path: Any, leaf: Any) -> Array:
    names = names_of(path)
    split = tuple(name for axes in split_axes(path, leaf) for name in axes)
    return Array(
        top=names[0] if names else "",
        layer="/".join(names[: 2 if len(names) > 1 and names[1].isdigit() else 1]),
        elements=math.prod(leaf.shape),
        itemsize=np.dtype(leaf.dtype).itemsize,
        split=split,
        expert_stack="experts" in names,
    )


def along(sizes: Sizes, axes: tuple[str, ...]) -> int:
    """Devices along these axes of a mesh."""
    return math.prod(sizes[AXES.index(name)] for name in axes)


def total(arrays: list[Array], size: Callable[[Array], int], *tops: str) -> int:
    """The sum of `size` over the arrays, of these parts of the model if any are named."""
    return sum(size(array) for array in arrays if not tops or array.top in tops)
