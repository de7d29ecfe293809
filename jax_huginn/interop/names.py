"""The one map between parameters here and those of the Torch layouts (public training checkpoint, Hugging Face).

A Torch `Linear` keeps its weight as (out, in), so matrices are transposed; expert stacks (E, in, out) are E tensors.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

# (parameter path here, name there, transposed), the first match counts. Groups carry block and expert numbers over.
_BLOCK = r"(prelude|core|coda)\.(\d+)\."
_RULES = (
    (r"wte", "transformer.wte.weight", False),
    (r"adapter", "transformer.adapter.weight", True),
    (r"norm_f\.weight", "transformer.ln_f.weight", False),
    (r"norm_moe\.weight", "transformer.moe_norm.weight", False),
    (_BLOCK + r"(norm_[1-4])\.weight", r"transformer.\1.\2.\3.weight", False),
    (_BLOCK + r"attn\.w_qkv", r"transformer.\1.\2.attn.Wqkv.weight", True),
    (_BLOCK + r"attn\.qk_bias", r"transformer.\1.\2.attn.qk_bias", False),
    (_BLOCK + r"attn\.w_out", r"transformer.\1.\2.attn.proj.weight", True),
    (_BLOCK + r"mlp\.w_(fc|proj)", r"transformer.\1.\2.mlp.\3.weight", True),
    (r"((?:core\.\d+\.)?moe)\.router", r"transformer.\1.router.weight", True),
    (r"((?:core\.\d+\.)?moe)\.shared\.(w_\w+)", r"transformer.\1.shared_expert.\2.weight", True),
    (r"((?:core\.\d+\.)?moe)\.experts\.(w_\w+)", r"transformer.\1.specialized_experts.{expert}.\2.weight", True),
)


@dataclass(frozen=True)
class Mapping:
    """One parameter here and the tensor or, for a stack of experts, the tensors that it is there."""

    path: str
    names: tuple[str, ...]
    transposed: bool
    stacked: bool

    def to_torch(self, parameter: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        parts = parameter if self.stacked else [parameter]
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.T if self.transposed else part

    def from_torch(self, get: Callable[[str], np.ndarray]) -> np.ndarray:
        parts = [get(name).T if self.transposed else get(name) for name in self.names]
        return np.stack(parts) if self.stacked else parts[0]


def mapping_of(path: str, shape: tuple[int, ...]) -> Mapping:
    """The mapping of the parameter at a dotted path, for example `core.0.attn.w_qkv`."""
    for pattern, replacement, transposed in _RULES:
        if match := re.fullmatch(pattern, path):
            name = re.sub(r"^transformer\.core\.", "transformer.core_block.", match.expand(replacement))
            if "{expert}" in name:
                names = tuple(name.format(expert=expert) for expert in range(shape[0]))
                return Mapping(path, names, transposed, stacked=True)
            return Mapping(path, (name,), transposed, stacked=False)
    raise KeyError(f"parameter {path} has no Torch name")


def mappings(params: Any) -> list[Mapping]:
    """The mapping of every parameter of a (concrete or abstract) tree, in the tree's order."""
    return [mapping_of(path, leaf.shape) for path, leaf in _flat(params)]


def to_torch(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every parameter, one at a time, so that no second copy of the model is ever held."""
    for path, leaf in _flat(params):
        yield from mapping_of(path, leaf.shape).to_torch(np.asarray(leaf))


def from_torch(abstract: Any, get: Callable[[str], np.ndarray]) -> Any:
    """The tree of parameters whose tensors `get(name)` returns; `abstract` gives structure, shapes and types.

    Raises:
        ValueError: a tensor whose shape does not fit, named.
    """

    def load(path, leaf):
        mapping = mapping_of(_dotted(path), leaf.shape)
        value = mapping.from_torch(get)
        if value.shape != leaf.shape:
            raise ValueError(f"{mapping.names[0]} gives {mapping.path} the shape {value.shape}, expected {leaf.shape}")
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(load, abstract)


def _flat(params: Any) -> list[tuple[str, Any]]:
    return [(_dotted(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def params_of(model: nnx.Module) -> Any:
    """A model's parameters as a pure tree."""
    return nnx.as_pure(nnx.split(model)[1])
