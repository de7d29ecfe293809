"""Cached generation: tokens/s of decoding beside what the memory's bandwidth allows, and the prefill's rate.

    python benchmarks/generate.py                                    # 3.5 B shape, bfloat16, r=32, on one H100
    python benchmarks/generate.py --batches 32 --contexts 2048 --policy mod --budget 8
    python benchmarks/generate.py --batches 1 8 --contexts 256 --speculate 1 2 4 8
    python benchmarks/generate.py --config configs/moe.py --batches 2 --contexts 96 --new 16 --recurrence 4   # a CPU

Weights are random. A case decodes the last `--new` tokens of its context after a prompt of the others; what ran first
is compiled and not counted. The bound reads every weight that a token needs and the whole cache once, at the data
sheet's bandwidth; it is null for an unknown device. A case whose cache does not fit prints the refusal.

With `--speculate` each case is also measured for these numbers of drafts a cycle. The time of a cycle depends little on
the drafts' acceptance, which random weights decide here; a cycle gives 1 + accepted tokens a row.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import parse, peak_gigabytes, report
from jax_huginn.config.checks import UserError
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config
from jax_huginn.cost.devices import DEVICES
from jax_huginn.inference import Drafts, Exit, generate
from jax_huginn.inference.cache import bytes_of
from jax_huginn.model.flops import forward_flops
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model
from jax_huginn.model.parameters import cast_params


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/huginn_3_5b.py", help="a preset; --section.field changes it")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 2048], help="prompt and new tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens (64)")
    parser.add_argument("--recurrence", type=int, default=32)
    parser.add_argument("--policy", default="full")
    parser.add_argument("--budget", type=int, default=0)
    parser.add_argument("--exit", help="a criterion; none by default")
    parser.add_argument("--exit-threshold", type=float)
    parser.add_argument("--speculate", type=int, nargs="*", default=[], help="drafts a cycle")
    parser.add_argument("--draft-recurrence", type=int, default=4, help="recurrences of a draft (4)")
    options, overrides = parse(parser)
    config = override(load_config(options.config), ["--model.dtype", "bfloat16", *overrides])
    model = random_model(config)
    for context in options.contexts:
        for batch in options.batches:
            for number in (0, *options.speculate):
                drafts = Drafts(number, options.draft_recurrence) if number else None
                report(benchmark="generate", config=options.config, **case(model, options, batch, context, drafts))


def case(model: MoEHuginnModel, options: Any, batch: int, context: int, drafts: Drafts | None) -> dict[str, Any]:
    """One batch at one context, timed at its second run."""
    config, length = model.config, context - options.new
    shape = {"batch": batch, "context": context, "new_tokens": options.new, "recurrence": options.recurrence}
    shape |= {"policy": options.policy, "exit": options.exit}
    shape |= {} if drafts is None else {"drafts": drafts.number, "draft_recurrence": drafts.recurrence}
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.model.vocab_size, (batch, length)).tolist()
    arguments = {
        "max_new_tokens": options.new,
        "recurrence": options.recurrence,
        "exit": options.exit and Exit(options.exit, options.exit_threshold),
        "policy": options.policy,
        "budget": options.budget,
        "drafts": drafts,
    }
    try:
        _, first = generate(model, prompts, **arguments)
        _, totals = generate(model, prompts, **arguments)
    except UserError as error:
        return shape | {"refused": str(error)}
    decoded = batch * (options.new - 1)  # the first new token comes from the prompt's logits
    bound = bound_of(config, options.recurrence, batch, context)
    outside, recurrence = forward_flops(config, length)
    flops = batch * length * (outside + options.recurrence * recurrence)
    if drafts is not None:
        cycles = totals.readouts / (drafts.number + 1)
        shape |= {"cycles": cycles, "cycle_seconds": totals.decode_seconds / cycles}
        shape |= {"accepted": totals.accepted / totals.drafted}
    return shape | {
        "tokens_per_second": decoded / totals.decode_seconds,
        "bound_tokens_per_second": bound,
        "share_of_bound": bound and decoded / totals.decode_seconds / bound,
        "mean_steps": totals.used / decoded,
        "computed_steps": totals.computed / decoded,
        "cache_gb": totals.cache_bytes / 1e9,
        "prompt_tokens_per_second": batch * length / totals.prompt_seconds,
        # The head reads one position of a prompt; prompts that fill no block of 32 are computed with their padding.
        "prompt_tflops": (flops - (batch * length - batch) * head_flops(config)) / totals.prompt_seconds / 1e12,
        "compile_seconds": first.compile_seconds,
        "peak_gb": peak_gigabytes(),
    }


def head_flops(config: Config) -> int:
    return 2 * config.model.vocab_size * config.model.width


def bound_of(config: Config, recurrence: float, batch: int, context: int) -> float | None:
    """Tokens/s if decoding did nothing but read weights and cache, with so many recurrences a token in the mean."""
    kind = jax.devices()[0].device_kind
    device = next((device for device in DEVICES.values() if device.kind in kind), None)
    if device is None:
        return None
    _, params = abstract(config)
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for name, tree in params.items()
    }
    sizes["adapter"] //= 2  # the half for the state; the other half is read once
    recurrent = sizes["core"] + sizes["adapter"]
    outside = sum(sizes.values()) - sizes["core"]
    one = bytes_of(config, batch, context, 0)
    each = bytes_of(config, batch, context, 1) - one
    seconds = (outside + one + recurrence * (recurrent + each)) / (device.memory_gbs * 1e9)
    return batch / seconds


def abstract(config: Config) -> tuple[nnx.GraphDef, Any]:
    """The model's structure and its parameters' shapes, in the types that it computes in."""
    graphdef, params = abstract_model(config)
    return graphdef, jax.eval_shape(lambda tree: cast_params(tree, config.model.dtype), params)


def random_model(config: Config) -> MoEHuginnModel:
    """Weights as at the start of training in size, drawn on the device in the type that they are kept in."""
    graphdef, params = abstract(config)
    leaves, structure = jax.tree.flatten(params)

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return [
            (0.4 / config.model.width) ** 0.5 * jax.random.normal(keys[i], leaf.shape, leaf.dtype)
            if leaf.ndim > 1
            else jnp.ones(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]

    return nnx.merge(graphdef, jax.tree.unflatten(structure, draw(jax.random.key(0))))


if __name__ == "__main__":
    run_verb(main)
