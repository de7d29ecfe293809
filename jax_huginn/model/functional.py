"""NNX modules as plain functions of their parameters, for use under JAX's own transforms."""

from typing import Any, TypeVar

from flax import nnx

_Module = TypeVar("_Module", bound=nnx.Module)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """A module's structure and its parameters, a nested dictionary of arrays."""
    graphdef, params = nnx.split(module)
    return graphdef, nnx.as_pure(params)


def params_of(module: nnx.Module) -> Any:
    """A module's parameters, a nested dictionary of arrays."""
    return split(module)[1]


def with_params(module: _Module, params: Any) -> _Module:
    """A copy of the module with other parameters, which may be tracers or abstract."""
    return nnx.merge(nnx.split(module)[0], params)
