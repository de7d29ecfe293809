"""Bytes that a training step needs on one device: exact for what lives between steps, a formula for the rest.

The compiler says it exactly (`xla.py`). The formula serves the search over meshes, and machines without the compiler;
tests hold it within 10 % of compiled and measured steps. Not counted: space of the kernels themselves, NCCL's buffers,
fragmentation.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.model.flops import Part, block_parts, core_has_moe, moe_parts
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.parameters import cast_params, names_of
from jax_huginn.model.recurrence import SUMMED_AT_ONCE
from jax_huginn.model.remat import KEPT
from jax_huginn.model.sharding import RULES, split_axes
from jax_huginn.ops.grouped_mlp import CAPACITY
from jax_huginn.parallel.mesh import AXES
from jax_huginn.training.optimizer import in_muon, make_optimizer

Sizes = tuple[int, int, int]
"""Devices along (data, fsdp, expert)."""
OUTER = ("prelude", "moe", "coda")
"""Parts of the model that are gathered layer by layer, and again in the backward pass."""


def along(sizes: Sizes, axes: tuple[str, ...]) -> int:
    """Number of devices along these axes of a mesh."""
    return math.prod(sizes[AXES.index(name)] for name in axes)


# ---- Arrays of a training state -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """One array of a training state, not allocated."""

    names: tuple[str, ...]
    """Its path, for example (core, 0, mlp, w_fc)."""
    shape: tuple[int, ...]
    bytes: int
    """The whole array's."""
    split: tuple[str, ...]
    """Mesh axes that split it."""

    @property
    def layer(self) -> str:
        """What is gathered together outside the core: a block, or the MoE."""
        return "/".join(self.names[: 2 if self.names[1].isdigit() else 1])

    @property
    def gathered_over(self) -> tuple[str, ...]:
        """Mesh axes over which it is gathered where it is used: all that split it, except a stack of experts'."""
        return tuple(name for name in self.split if not ("experts" in self.names and name in RULES["experts"]))

    def part(self, sizes: Sizes) -> int:
        """Bytes of a device's part."""
        return self.bytes // along(sizes, self.split)

    def gathered(self, sizes: Sizes) -> int:
        """Bytes on a device where it is used."""
        return self.part(sizes) * along(sizes, self.gathered_over)


@dataclass(frozen=True)
class State:
    """All arrays of a training state."""

    weights: list[Array]
    """Master weights, in `model.param_dtype`."""
    copies: list[Array]
    """The weights as the step computes with them; their gradients have the same types."""
    moments: list[Array]
    muon: list[Array]
    """Those of the weights that Muon orthogonalises."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(array.shape) for array in self.weights)

    @property
    def core_gradient(self) -> int:
        """Bytes of the core's whole gradient, that of the adapter's half for the state included."""
        return _total(self.copies, _whole, "core") + _total(self.copies, _whole, "adapter") // 2


def state_arrays(config: Config) -> State:
    _, weights = abstract_model(config)
    copies = jax.eval_shape(lambda weights: cast_params(weights, config.model.dtype), weights)
    moments = jax.eval_shape(make_optimizer(config).init, weights)
    arrays, chosen = _arrays(weights), jax.tree.leaves(in_muon(weights))
    muon = list(itertools.compress(arrays, chosen)) if config.optimizer.name == "muon" else []
    return State(arrays, _arrays(copies), _arrays(moments), muon)


def _arrays(tree: Any) -> list[Array]:
    return [_array(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _array(path: Any, leaf: Any) -> Array:
    split = tuple(name for axes in split_axes(path, leaf) for name in axes)
    return Array(tuple(names_of(path)), leaf.shape, math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize, split)


def _whole(array: Array) -> int:
    return array.bytes


def _total(arrays: list[Array], size: Callable[[Array], int], *tops: str) -> int:
    """The sum of a size over the arrays, or over those of some parts of the model (wte, prelude, core, ...)."""
    return sum(size(array) for array in arrays if not tops or array.names[0] in tops)


# ---- Activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on one device."""

    outside: float
    """Kept by prelude and MoE, and what every recurrence receives of the embedding."""
    coda: float
    recurrence: float
    """Kept by one recurrence with gradient."""
    recomputed: float
    """The rest of one recurrence, recomputed for its backward pass, and the gradients inside one of its blocks."""


def tokens_at_once(config: Config, sizes: Sizes) -> int:
    """Tokens of a micro-batch on one device."""
    train = config.train
    return train.batch_size // train.micro_batches // along(sizes, AXES) * train.sequence_length


def activations(config: Config, sizes: Sizes, fused_attention: bool) -> Activations:
    """Counted in elements per token, by the results of each block's parts and what `compute.remat` keeps of them.

    Attention without a fused kernel also holds (H,S,S) arrays in float32: the probabilities of every block of the
    recurrence (without remat also scores and exponentials), and in the block at hand scores and two gradients.
    """
    model, moe, remat, length = config.model, config.moe, config.compute.remat, config.train.sequence_length
    itemsize = jnp.dtype(model.dtype).itemsize
    scores = 0 if fused_attention else model.heads * length * 4 / itemsize
    routed, core_moe = moe.width * (1 + moe.active * CAPACITY), core_has_moe(config)
    hidden = routed if core_moe else model.mlp_width

    def everything(parts: list[Part], hidden: float) -> float:
        """Also the normed inputs and the hidden layer's product."""
        return sum(part.result for part in parts) + 3 * model.width + hidden

    def kept(parts: list[Part], hidden: float) -> float:
        if remat == "none":
            return everything(parts, hidden) + 3 * scores
        return sum(part.result for part in parts if part.name in KEPT[remat])

    block = model.width + kept(block_parts(config, length), model.mlp_width)  # with its input
    core = block_parts(config, length, core_moe, CAPACITY)
    outside = model.prelude_layers * block + model.width
    if moe.experts and not core_moe:
        outside += 2 * model.width + kept(moe_parts(config, CAPACITY), routed)
    adapter = model.width * ("matmul" in KEPT[remat])
    recurrence = model.width + adapter + model.core_layers * kept(core, hidden)
    # Gradients of gate, up and their product; of queries, keys and values before and after RoPE; of the block's output.
    recomputed = 3 * hidden + 6 * model.heads * model.head_dim + model.width + 3 * scores
    recomputed += model.width - adapter
    if remat != "none":
        recomputed += model.core_layers * (everything(core, hidden) + scores - kept(core, hidden))
    if remat == "dots_except_gate_up":  # each block recomputes them when its turn comes
        recomputed -= (model.core_layers - 1) * 2 * hidden
    scale = tokens_at_once(config, sizes) * itemsize
    coda = model.width + model.coda_layers * block
    return Activations(*(scale * elements for elements in (outside, coda, recurrence, recomputed)))


# ---- A device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, by kind."""

    between_steps: dict[str, float]
    """What lives between steps, and the step's tokens: the arguments of the compiled step."""
    within_step: dict[str, float]

    @property
    def arguments(self) -> float:
        return sum(self.between_steps.values())

    @property
    def temporaries(self) -> float:
        return sum(self.within_step.values())

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries

    @property
    def kinds(self) -> dict[str, float]:
        return self.between_steps | self.within_step


def device_memory(config: Config, sizes: Sizes, state: State, fused_attention: bool) -> Memory:
    """The fullest moment is the head, where all activations are kept, or lies in the core's backward pass.

    `fused_attention`: a kernel that never holds the (S,S) scores.
    """
    model, train = config.model, config.train
    several = train.micro_batches > 1

    def part(arrays: list[Array], *tops: str) -> int:
        return _total(arrays, lambda array: array.part(sizes), *tops)

    rows = train.batch_size // along(sizes, AXES)
    between_steps: dict[str, float] = {
        "weights": part(state.weights),
        "moments": part(state.moments),
        # Inputs and labels; n and k of every micro-batch; the step's number and that of skipped steps.
        "tokens, depths, counts": 4 * (2 * rows * train.sequence_length + 2 * train.micro_batches + 2),
    }
    act = activations(config, sizes, fused_attention)
    within_step: dict[str, float] = {"activations outside the core": act.outside}
    copied = model.dtype != model.param_dtype
    if copied:
        within_step["copies to compute with"] = part(state.copies)
    if along(sizes, ("fsdp", "expert")) > 1:
        # Where micro-batches contain loops, the compiler gathers all weights before the loop over micro-batches.
        looped = config.compute.remat == "full" or not config.compute.unroll
        within_step["gathered weights"] = _gathered(state.copies, sizes, at_once=several and looped)
    if several:
        within_step["sum over micro-batches"] = part(state.weights)
    chunk = min(config.compute.loss_chunk, tokens_at_once(config, sizes))
    k, itemsize = config.recurrence.gradient_steps, jnp.dtype(model.dtype).itemsize
    head = {
        "activations": act.coda + k * act.recurrence,
        # In float32 logits and softmax, in model.dtype logits and their gradient.
        "logits of a chunk": chunk * model.vocab_size * (2 * 4 + 2 * itemsize),
        "gradient of the head": 4 * model.vocab_size * model.width,
    }
    core = _core(config, act, state.core_gradient)
    if several or not copied:  # else a gradient takes the place of the copy of its weight
        core["gradients of head and coda"] = part(state.copies, "wte", "coda")
    return Memory(between_steps, within_step | max(head, core, key=lambda kinds: sum(kinds.values())))


def _core(config: Config, act: Activations, gradient: int) -> dict[str, float]:
    """The core's backward pass. A loop adds each step's gradient to the sum, in place or not. Unrolled steps add theirs
    a few at once, while their activations go: the fullest step counts."""
    k, compute = config.recurrence.gradient_steps, config.compute
    moments = [(k, 1 if compute.remat == "full" else 2)]  # steps kept, gradients
    if compute.unroll and compute.remat != "full":
        moments = [(k - step, step % SUMMED_AT_ONCE + 1 + (step >= SUMMED_AT_ONCE)) for step in range(k)]
    kept, gradients = max(moments, key=lambda moment: moment[0] * act.recurrence + moment[1] * gradient)
    return {
        "activations": kept * act.recurrence,
        "recomputed activations": act.recomputed,
        "gradients of the core": gradients * gradient,
    }


def _gathered(copies: list[Array], sizes: Sizes, at_once: bool) -> int:
    """Weights gathered at the same time: all of them where the compiler moves the gathers before the loop over
    micro-batches; else those of embedding, adapter and core, and of one layer outside."""
    whole = _total(copies, lambda array: array.gathered(sizes))
    layers = Counter()
    for array in copies:
        if array.names[0] in OUTER:
            layers[array.layer] += array.gathered(sizes)
    return whole if at_once else whole - layers.total() + max(layers.values(), default=0)
