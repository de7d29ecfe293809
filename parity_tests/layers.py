"""Looking inside: every layer of a forward pass in order, one layer alone, and the router's choices.

Shapes: T tokens, A experts a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.overrides import TorchFunctionMode

from jax_huginn.interop.names import mapping_of
from jax_huginn.model import blocks, moe
from parity_tests.support import Batch, Pair, Tensors, array_of, compare, jit
from torch_reference.model import SandwichBlock

# ---- Layer by layer ---------------------------------------------------------------------------------------------


def layer_outputs(pair: Pair, batch: Batch, depth: tuple[int, int]) -> tuple[Tensors, Tensors]:
    """What every layer receives or returns, in order, by Torch name and number of the call.

    JAX runs without compilation, so that layers inside loops are seen. Both packages name their layers' classes
    alike and run them in the same order. Nothing is checkpointed, which would trace.
    """
    seen: list[np.ndarray] = []
    twin_seen: Tensors = {}
    calls: dict[str, int] = {}
    state = jnp.asarray(batch.state, pair.dtype)

    def note(name: str, x: torch.Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        twin_seen[f"{name}, call {calls[name]}"] = array_of(x)

    hooks = []
    for name, layer in pair.twin.named_modules():
        if isinstance(layer, SandwichBlock):
            hooks.append(layer.register_forward_pre_hook(lambda _, x, name=name: note(f"{name} input", x[0])))
        if type(layer).__name__ in LAYERS:
            hooks.append(layer.register_forward_hook(lambda _, x, y, name=name: note(name, _first(y))))
    try:
        with torch.no_grad():
            pair.twin(torch.from_numpy(batch.tokens), depth, torch.from_numpy(batch.state))
    finally:
        for hook in hooks:
            hook.remove()
    unchecked = mock.patch.object(jax, "checkpoint", lambda function, **_: function)
    with _recorded(seen), unchecked, jax.disable_jit():
        pair.model()(jnp.asarray(batch.tokens), depth, state)
    assert len(seen) == len(twin_seen), f"JAX ran {len(seen)} layers and Torch {len(twin_seen)}"
    return dict(zip(twin_seen, seen, strict=True)), twin_seen


LAYERS = {layer.__name__: layer for layer in (*vars(blocks).values(), moe.MoE) if isinstance(layer, type)}
LAYERS = {name: LAYERS[name] for name in ("RMSNorm", "Attention", "GatedMLP", "SandwichBlock", "MoE")}


@contextmanager
def _recorded(seen: list[np.ndarray]) -> Iterator[None]:
    """Appends the outputs of every layer in JAX, and the inputs of its blocks."""

    def recording(original: Callable, is_block: bool) -> Callable:
        def call(self: Any, x: jax.Array, *rest: Any) -> Any:
            if is_block and not isinstance(x, jax.core.Tracer):
                seen.append(np.asarray(x))
            y = original(self, x, *rest)
            if not isinstance(_first(y), jax.core.Tracer):  # shapes are evaluated by tracing
                seen.append(np.asarray(_first(y)))
            return y

        return call

    patches = [
        mock.patch.object(layer, "__call__", recording(layer.__call__, name == "SandwichBlock"))
        for name, layer in LAYERS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _first(y: Any) -> Any:
    return y[0] if isinstance(y, tuple) else y


def first_layer_off(pair: Pair, batch: Batch, depth: tuple[int, int], tolerance: float) -> str:
    differences = compare(*layer_outputs(pair, batch, depth), tolerance)
    if not differences:
        return "Every layer of the forward pass agrees, so the fault lies in the head, the losses or the gradients."
    return f"The first layer that is off is {differences[0]}"


# ---- A single layer ---------------------------------------------------------------------------------------------


def layer_gradients(layer: nnx.Module, inputs: list[np.ndarray], prefix: str, *constants: Any) -> Tensors:
    """Output of a JAX layer and the gradients of sum(output * cosines) for inputs and parameters, by Torch name.

    `prefix` is the layer's path in the model, by which its parameters have names.
    """
    graphdef, state = nnx.split(layer)

    def run(params: Any, inputs: list[jax.Array]) -> jax.Array:
        return _first(nnx.merge(graphdef, params)(*inputs, *constants))

    @jit
    def both(params: Any, inputs: list[jax.Array]) -> Any:
        y, vjp = jax.vjp(run, params, inputs)
        return y, vjp(_cotangent(y.shape).astype(y.dtype))

    y, (params, d_inputs) = both(nnx.as_pure(state), [jnp.asarray(x) for x in inputs])
    named = {"output": np.asarray(y)} | {f"d input {i}": np.asarray(d) for i, d in enumerate(d_inputs)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        full = f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        named |= {name: np.asarray(x) for name, x in mapping_of(full, leaf.shape).to_torch(np.asarray(leaf))}
    return named


def twin_layer_gradients(layer: torch.nn.Module, inputs: list[np.ndarray], prefix: str) -> Tensors:
    """The same of a Torch layer; `prefix` is its path in the state dict."""
    layer.zero_grad()
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    y = _first(layer(*leaves))
    (y * torch.from_numpy(_cotangent(tuple(y.shape))).to(y)).sum().backward()
    named = {"output": array_of(y)} | {f"d input {i}": array_of(x.grad) for i, x in enumerate(leaves)}
    return named | {f"{prefix}.{name}": array_of(weight.grad) for name, weight in layer.named_parameters()}


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.cos(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


class RouterSpy(TorchFunctionMode):
    """Sees, and may fix, what the Torch router chooses, without a change to the model.

    Its MoE sorts the logits and takes a softmax over the chosen ones; nothing else calls these two methods.
    """

    def __init__(self, fixed_TA: np.ndarray | None = None, flip_weights: bool = False):
        super().__init__()
        self.fixed = None if fixed_TA is None else torch.from_numpy(fixed_TA)
        self.flip_weights = flip_weights
        self.orders: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.sort:
            if self.fixed is not None:
                result = SimpleNamespace(indices=self.fixed)
            self.orders.append(array_of(result.indices))
        elif func is torch.Tensor.softmax:
            result = result.flip(-1) if self.flip_weights else result
            self.weights.append(array_of(result))
        return result


@contextmanager
def jax_router_choosing(fixed_TA: np.ndarray) -> Iterator[None]:
    """Inside, every JAX router chooses these experts; trace inside, too."""

    def chosen(logits_TE: jax.Array, active: int) -> tuple[jax.Array, jax.Array]:
        return jnp.take_along_axis(logits_TE, jnp.asarray(fixed_TA), axis=1), jnp.asarray(fixed_TA)

    with mock.patch.object(jax.lax, "top_k", chosen):
        yield
