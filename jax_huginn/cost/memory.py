"""Bytes on one device during a step, by kind, at the step's fullest moment.

Between steps a device keeps its part of weights and moments. Within one, three moments can be the fullest: the head
(all activations are kept), the core's backward pass (its whole gradients are there too), and the end of the backward
pass (all gradients are). Kernels' own space, NCCL's buffers and fragmentation are not counted.
"""

from dataclasses import dataclass

from jax_huginn.config.schema import Config
from jax_huginn.cost.activations import Activations
from jax_huginn.cost.shapes import Shapes, Sizes, along, total
from jax_huginn.model.recurrence import SUMMED_AT_ONCE
from jax_huginn.parallel.mesh import AXES

HEAD = ("wte", "coda")  # whose gradients are there before the core's


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at its fullest moment."""

    moment: str
    """head, recurrence (its backward pass) or end (of the backward pass)."""
    kept: dict[str, int]
    """What lives between steps, and the step's tokens: the compiled step's arguments."""
    temporary: dict[str, int]

    @property
    def arguments(self) -> int:
        return sum(self.kept.values())

    @property
    def temporaries(self) -> int:
        return sum(self.temporary.values())

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def device_memory(config: Config, sizes: Sizes, shapes: Shapes, fused_attention: bool) -> Memory:
    """`fused_attention`: a kernel that never holds the (S,S) scores."""
    train = config.train
    rows = train.batch_size // along(sizes, AXES)
    kept = {
        "weights": total(shapes.params, lambda array: array.part(sizes)),
        "moments": total(shapes.optimizer, lambda array: array.part(sizes)),
        # Inputs and labels, n and k of every micro-batch, the number of the step.
        "tokens, depths, counts": 4 * (2 * rows * train.sequence_length + 2 * train.micro_batches + 2),
    }
    act = Activations(config, sizes, fused_attention)
    moments = {
        "head": _head(config, sizes, shapes, act),
        "recurrence": _recurrence(config, sizes, shapes, act),
        "end": _weights(config, sizes, shapes, gathered=(), formed=()),
    }
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(fullest, kept, {kind: size for kind, size in moments[fullest].items() if size})


def core_gradient(shapes: Shapes) -> int:
    """The core's whole gradient, with the adapter's half that reads the state, in the compute type."""
    return total(shapes.compute, lambda array: array.whole, "core") + _adapter(shapes) // 2


def _adapter(shapes: Shapes) -> int:
    return total(shapes.compute, lambda array: array.whole, "adapter")


def _head(config: Config, sizes: Sizes, shapes: Shapes, act: Activations) -> dict[str, int]:
    model = config.model
    chunk = min(config.compute.loss_chunk, act.tokens)
    vocabulary = model.vocab_size
    # float32: logits, softmax, the head's gradient, summed over chunks; in model.dtype: logits and their gradient.
    logits = chunk * vocabulary * 2 * 4 + act.bytes(2 * vocabulary) * chunk // max(act.tokens, 1)
    kinds = _weights(config, sizes, shapes, gathered=("core", "adapter", "wte"), formed=None)
    kinds["activations"] = act.outside() + act.coda() + steps_with_gradient(config) * act.recurrence()
    kinds["logits of a chunk"] = logits
    kinds["gradient of the head"] = vocabulary * model.width * 4
    return kinds


def _recurrence(config: Config, sizes: Sizes, shapes: Shapes, act: Activations) -> dict[str, int]:
    most, gradient = steps_with_gradient(config), core_gradient(shapes)
    kinds = _weights(config, sizes, shapes, gathered=("core", "adapter"), formed=HEAD)
    kinds["activations"] = act.outside()
    kinds["recomputed activations"] = act.recomputed()
    if config.compute.remat == "full":  # a loop, which adds to one sum and keeps the states
        kinds["gradients of the core"] = gradient
        kinds["activations"] += most * act.recurrence()
    elif config.compute.unroll:  # as activations go, gradients come, and every few are added to the sum
        unadded = [index % SUMMED_AT_ONCE + 1 + (index >= SUMMED_AT_ONCE) for index in range(most)]
        done = max(range(most), key=lambda index: (most - index) * act.recurrence() + unadded[index] * gradient)
        kinds["gradients of the core"] = unadded[done] * gradient
        kinds["activations"] += (most - done) * act.recurrence()
    else:  # a scan: the sum and one step's
        kinds["gradients of the core"] = 2 * gradient
        kinds["activations"] += most * act.recurrence()
    return kinds


def _weights(
    config: Config, sizes: Sizes, shapes: Shapes, gathered: tuple[str, ...], formed: tuple[str, ...] | None
) -> dict[str, int]:
    """Weights to compute with and gradients of the weights, the core's unfinished ones aside.

    Args:
        gathered: what of the model is gathered at that moment; one other layer always is.
        formed: what of the model has its gradient; () means all of it and None nothing.
    """
    several = config.train.micro_batches > 1
    compute = shapes.compute
    kinds = {}
    gradients = 0 if formed is None else total(compute, lambda array: array.part(sizes), *formed)
    if config.model.dtype != config.model.param_dtype:
        copies = total(compute, lambda array: array.part(sizes))
        # A gradient takes the place of the copy of its weight, unless the next micro-batch needs that.
        kinds["copies to compute with"] = copies if several else copies - gradients
    kinds["gradients"] = gradients
    if along(sizes, ("fsdp", "expert")) > 1:
        if several:  # the compiler gathers before the loop over micro-batches, so all at once
            kinds["gathered weights"] = total(compute, lambda array: array.gathered(sizes))
        else:
            others = {array.layer for array in compute if array.top in ("prelude", "coda", "moe")}
            layers = [sum(array.gathered(sizes) for array in compute if array.layer == name) for name in others]
            whole = total(compute, lambda array: array.gathered(sizes), *gathered) if gathered else 0
            kinds["gathered weights"] = whole + max(layers, default=0)
    if several:
        kinds["sum over micro-batches"] = total(shapes.params, lambda array: array.part(sizes))
    return kinds


def steps_with_gradient(config: Config) -> int:
    """The usual k, of which the compiled step keeps room for its activations."""
    return min(config.recurrence.mean, config.recurrence.backprop_depth)
