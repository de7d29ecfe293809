"""Seconds of a step on one device: matmuls and attention by their rates, everything else by the bytes it moves.

Elements a token: D width, F MLP hidden width, H query heads, K head width, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from jax_huginn.config.schema import Config
from jax_huginn.cost.activations import Activations
from jax_huginn.cost.devices import ATTENTION_BACKWARD, ATTENTION_FORWARD, HEAD_WIDTH, MATMUL, MEMORY, Device
from jax_huginn.cost.memory import core_gradient, steps_with_gradient
from jax_huginn.cost.shapes import Shapes, Sizes, total
from jax_huginn.model.flops import forward_flops
from jax_huginn.model.recurrence import SUMMED_AT_ONCE

# Passes of the forward elementwise work that its backward takes: it reads inputs and cotangents and writes gradients.
BACKWARD_PASSES = 2
LOGIT_BYTES = 16  # float32 softmax and its gradient, over V a token: written, read, written, read


@dataclass(frozen=True)
class Work:
    """What one device does in a step."""

    matmul: float
    """FLOPs, recomputed ones counted."""
    attention_forward: float
    attention_backward: float
    """Of heads padded to `HEAD_WIDTH`."""
    moved: float
    """Bytes read and written by all that is no matmul: norms, RoPE, SwiGLU, sums of gradients, the optimiser."""

    def seconds(self, device: Device) -> dict[str, float]:
        return {
            "matmuls": self.matmul / (MATMUL * device.peak),
            "attention": self.attention_forward / (ATTENTION_FORWARD * device.peak)
            + self.attention_backward / (ATTENTION_BACKWARD * device.peak),
            "elementwise and optimiser": self.moved / (MEMORY * device.memory_gbs * 1e9),
        }


def step_work(config: Config, sizes: Sizes, shapes: Shapes, n: float, k: float) -> Work:
    """One step whose micro-batches have n recurrences without and k with gradient on average."""
    model, train = config.model, config.train
    tokens = Activations(config, sizes, True).tokens * train.micro_batches
    blocks, core_blocks = model.prelude_layers + model.coda_layers, model.core_layers

    # ---- FLOPs a token: forward, of one block's attention, of one recurrence and of all outside
    scores = 2.0 * train.sequence_length * model.heads * model.head_dim
    outside, recurrence = forward_flops(config, train.sequence_length)
    adapter_half = 2 * model.width**2  # that of the embedding, once for all recurrences
    outside += adapter_half - blocks * scores
    recurrence -= adapter_half + core_blocks * scores
    head = 2 * model.vocab_size * model.width

    # ---- what is done once more in the backward pass
    matmuls_again = config.compute.remat in ("full", "attention")
    attention_again = config.compute.remat == "full"
    forward_blocks, gradient_blocks = (n + k) * core_blocks + blocks, k * core_blocks + blocks
    matmul = (n + 3 * k) * recurrence + 3 * outside
    if matmuls_again:
        matmul += k * recurrence + outside - head - adapter_half
    elif config.compute.remat == "dots_except_gate_up":
        matmul += _gate_up(config, gradient_blocks, k)
    attention_forward = (forward_blocks + attention_again * gradient_blocks) * scores
    padded = math.ceil(model.head_dim / HEAD_WIDTH) * HEAD_WIDTH / model.head_dim
    attention_backward = 2 * gradient_blocks * scores * padded

    # ---- bytes
    itemsize = jnp.dtype(model.dtype).itemsize
    # Read and written by a block: norms, two of them with a sum before (5 + 5 D), biases and RoPE (6), SwiGLU (3 F).
    block = itemsize * (16 * model.width + 3 * model.mlp_width)
    passes = forward_blocks + gradient_blocks * (BACKWARD_PASSES + (config.compute.remat != "none"))
    moved = tokens * (passes * block + LOGIT_BYTES * model.vocab_size)
    moved += train.micro_batches * _sums_of_gradients(config, shapes, k)
    moved += _update(config, sizes, shapes)
    return Work(tokens * matmul, tokens * attention_forward, tokens * attention_backward, moved)


def _gate_up(config: Config, gradient_blocks: float, k: float) -> float:
    """FLOPs a token of the first matmul of all MLPs that a gradient passes, experts included."""
    model, moe = config.model, config.moe
    experts = 4 * model.width * moe.width * (moe.active + 1) * (moe.experts > 0)
    mlp = 4 * model.width * model.mlp_width
    if moe.placement == "core" and moe.experts:
        return (gradient_blocks - k * model.core_layers) * mlp + k * model.core_layers * experts
    return gradient_blocks * mlp + experts


def _sums_of_gradients(config: Config, shapes: Shapes, k: float) -> float:
    """Bytes of adding up a micro-batch's weight gradients of the core: each step's is read, and for every few of them
    the sum read and written, but not read at first. The rarer k, 1 step of 70, counts as the usual one."""
    unrolled = config.compute.unroll and config.compute.remat != "full"
    additions = math.ceil(steps_with_gradient(config) / SUMMED_AT_ONCE) if unrolled else k
    return core_gradient(shapes) * (k + 2 * additions - (1 if unrolled else 0))


def _update(config: Config, sizes: Sizes, shapes: Shapes) -> float:
    """Bytes of the step's end: gradients read by two norms and the update; moments and weights read and written; the
    copies to compute with made; and of each micro-batch but one the sum of gradients read and written."""
    weights = total(shapes.params, lambda array: array.part(sizes))
    copies = total(shapes.compute, lambda array: array.part(sizes))
    moments = total(shapes.optimizer, lambda array: array.part(sizes))
    several = config.train.micro_batches > 1
    gradients = weights if several else copies
    sums = config.train.micro_batches * (2 * weights + copies) if several else 0
    return 3 * gradients + 2 * (weights + moments) + weights + copies + sums
