"""Weights of a model that is not a run of ours: named tensors that are read one at a time, and their description."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.model_config import Dtype
from jax_huginn.interop.names import mapping_of, mappings
from jax_huginn.model.huginn import abstract_model
from jax_huginn.ops.rope import rope_table

EMBEDDING, LM_HEAD, FREQUENCIES = "transformer.wte.weight", "lm_head.weight", "freqs_cis"
FLOATS = {np.dtype(kind): name for name, kind in (
    ("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32), ("float64", np.float64)
)}  # fmt: skip


@dataclass(frozen=True)
class LazyArray:
    """An array that is read when it is asked for, so that a model larger than the memory passes through it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model under their Torch names, checked against its config."""

    path: Path
    config: Config
    """Sections `model`, `moe` and `recurrence` are the file's; the others are defaults."""
    tensors: Mapping[str, LazyArray]
    tokenizer: Path | None
    """The folder of the tokenizer that came with the weights."""

    def params(self) -> Any:
        """The parameters as a tree of `LazyArray` of type `model.param_dtype`."""

        def lazy(path: Any, leaf: Any) -> LazyArray:
            mapping = mapping_of(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)

            def read() -> np.ndarray:
                return mapping.from_torch(self._finite).astype(leaf.dtype)

            return LazyArray(leaf.shape, leaf.dtype, read)

        return jax.tree_util.tree_map_with_path(lazy, abstract_model(self.config)[1])

    def _finite(self, name: str) -> np.ndarray:
        numbers = self.tensors[name].read()
        if not np.isfinite(numbers).all():
            raise WeightsError(f"{self.path}: {name} holds numbers that are not finite")
        return numbers


def tensor_shapes(config: Config, params: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an exported model, in the order of `names.to_torch`, then the repeated two."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mapping, leaf in zip(mappings(params), jax.tree.leaves(params), strict=True):
        shape: tuple[int, ...] = leaf.shape[1:] if mapping.stacked else leaf.shape
        shapes |= dict.fromkeys(mapping.names, shape[::-1] if mapping.transposed else shape)
    model = config.model
    return {**shapes, LM_HEAD: shapes[EMBEDDING], FREQUENCIES: (1, model.max_length, 1, model.head_dim // 2, 2)}


def frequencies(config: Config) -> np.ndarray:
    """The buffer `freqs_cis`: cos and sin stacked last, (1, max_length, 1, K/2, 2) float32."""
    model = config.model
    return rope_table(model.max_length, model.head_dim, model.rope_base).astype(np.float32)[None, :, None]


def compute_type(tensors: Mapping[str, LazyArray]) -> Dtype:
    """The type that a model of these tensors computes in: theirs; float16, which has too few exponents, as float32."""
    kinds = {FLOATS[tensor.dtype] for name, tensor in tensors.items() if name not in (LM_HEAD, FREQUENCIES)}
    if "float64" in kinds:
        return "float64"
    return "bfloat16" if kinds == {"bfloat16"} else "float32"


_WRAPPERS = re.compile(r"^((_orig_mod|_forward_module|_original_module|module|model)\.)+")


def unwrapped(path: Path, tensors: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The tensors under the names that they have without `torch.compile` and training wrappers.

    The public training code saves every tensor twice, as `_forward_module` and as `_original_module`, of which the
    latter counts. Any other two of one name must be equal.
    """
    plain: dict[str, LazyArray] = {}
    originals = {_WRAPPERS.sub("", key) for key in tensors if "_original_module." in key}
    for key, tensor in tensors.items():
        name = _WRAPPERS.sub("", key)
        if "_forward_module." in key and name in originals:
            continue
        if name in plain and not _equal(plain[name], tensor):
            raise WeightsError(f"{path}: {name} is there twice, as {key} too, with other numbers")
        plain[name] = tensor
    return plain


def _equal(one: LazyArray, other: LazyArray) -> bool:
    # Two names of one place in a file read by the same function need no reading.
    return one.read == other.read or (one.shape == other.shape and np.array_equal(one.read(), other.read()))


def checked(
    path: Path, tensors: dict[str, LazyArray], describe: Callable[[Dtype], Config], tokenizer: Path | None
) -> Weights:
    """The tensors of the file at `path` as `Weights`, once they are those of the model that `describe(dtype)` gives.

    Raises:
        WeightsError: a tensor that is missing, unknown or of another shape or type; a head that is not tied to the
            embedding; rotary angles that are not ours.
    """
    tensors = unwrapped(path, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise WeightsError(f"{path}: {name} is not a tensor of floating-point numbers of 16 bits or more")
    config = describe(compute_type(tensors))
    model = config.model
    parts = model.prelude_layers + model.core_layers + model.coda_layers + config.moe.experts
    if parts > len(tensors):  # before a model is made of a number that may be anything
        raise WeightsError(f"{path}: {len(tensors)} tensors are too few for a model of {parts} blocks and experts")
    if EMBEDDING not in tensors and LM_HEAD in tensors:  # one of two tied tensors is all that some writers keep
        tensors = {**tensors, EMBEDDING: tensors[LM_HEAD]}

    shapes = tensor_shapes(config, abstract_model(config)[1])
    repeated = {name: shapes.pop(name) for name in (LM_HEAD, FREQUENCIES)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise WeightsError(f"{path}: {name} is missing")
        if tensors[name].shape != shape:
            raise WeightsError(f"{path}: {name} has shape {tensors[name].shape}, not {shape}")
    for name, tensor in tensors.items():
        if name not in shapes and name not in repeated:
            raise WeightsError(f"{path}: {name} is not a tensor of this model")
        if name in repeated and tensor.shape != repeated[name]:
            raise WeightsError(f"{path}: {name} has shape {tensor.shape}, not {repeated[name]}")
    _require_tied(path, tensors)
    _require_our_angles(path, config, tensors)
    return Weights(path, config, {name: tensors[name] for name in shapes}, tokenizer)


def _require_tied(path: Path, tensors: Mapping[str, LazyArray]) -> None:
    head, embedding = tensors.get(LM_HEAD), tensors[EMBEDDING]
    if head is not None and not _equal(head, embedding):
        raise WeightsError(f"{path}: {LM_HEAD} differs from {EMBEDDING}, but this model ties them")


def _require_our_angles(path: Path, config: Config, tensors: Mapping[str, LazyArray]) -> None:
    if FREQUENCIES not in tensors:
        return
    model = config.model
    with np.errstate(invalid="ignore"):  # refused below
        theirs = tensors[FREQUENCIES].read().astype(np.float64)[0, :, 0]
    error = np.abs(theirs - rope_table(model.max_length, model.head_dim, model.rope_base)).max()
    # cos and sin of float32 angles up to 4096 are off by 2e-4, and bfloat16 rounds them by 4e-3.
    tolerance = 1e-3 if ml_dtypes.finfo(tensors[FREQUENCIES].dtype).eps < 1e-3 else 1e-2
    if not error <= tolerance:  # nan is refused too
        raise WeightsError(f"{path}: {FREQUENCIES} is off by {error:.1g} from rope_base={model.rope_base:g}")
