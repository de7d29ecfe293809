"""Held-out loss under the cache's policies, read token by token as generation reads.

    python benchmarks/policy_loss.py runs/moe                    # r = 8, 64 pieces of 256 tokens, prompts of 64

A policy changes what a token sees of the tokens before it, so a text cannot be read in one pass: the first `--prompt`
tokens are read as a prompt is, every further one over the cache. Bits per byte are of the tokens after the prompt, with
the standard error over pieces, and that of the difference from `full` on the same pieces. `whole` is one pass without a
cache, which `full` must equal.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.common import parse, report
from benchmarks.pieces import model_and_pieces
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.inference.cache import slots_of
from jax_huginn.inference.speculation import read
from jax_huginn.inference.thinking import Depth, think_prompts
from jax_huginn.model import functional, initializers


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--recurrence", type=int, default=8)
    parser.add_argument("--pieces", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece (256)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens read as a prompt (64)")
    parser.add_argument("--budgets", type=int, nargs="*", default=[4, 2], help="slots of the policy mod")
    options, _ = parse(parser)
    model, tokens_BS, bytes_V = model_and_pieces(options.source, options.length, options.pieces)
    graphdef, params = functional.split(model.cast())
    state_LD = jnp.asarray(initializers.fixed_state(0, options.length, model.config.model.width))
    bytes_B = bytes_V[tokens_BS[:, options.prompt :]].sum(axis=1)
    nats = {"whole": in_one_pass(graphdef, options.recurrence, options.prompt, params, tokens_BS, state_LD)}
    for policy, budget in (("full", 0), *(("mod", budget) for budget in options.budgets), ("last", 0)):
        slots = slots_of(policy, budget, options.recurrence)
        name = f"{policy} {budget}" if budget else policy
        nats[name] = by_tokens(graphdef, options.recurrence, slots, options.prompt, params, tokens_BS, state_LD)
    for name, nats_B in nats.items():
        bits, error = ratio(np.asarray(nats_B), bytes_B)
        more, more_error = ratio(np.asarray(nats_B) - np.asarray(nats["full"]), bytes_B)
        report(
            benchmark="policy_loss", policy=name, recurrence=options.recurrence, pieces=options.pieces,
            tokens=int(tokens_BS[:, options.prompt :].size), bits_per_byte=bits, standard_error=error,
            more_than_full=more, more_standard_error=more_error,
        )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 2))
def in_one_pass(graphdef: nnx.GraphDef, recurrence: int, prompt: int, params: Any, tokens_BS: Any, state_LD: Any):
    """Nats of all tokens after the prompt, (B,)."""
    model = nnx.merge(graphdef, params)
    logits_BSV = model.head(model.hidden(tokens_BS[:, :-1], recurrence, 0, state_LD[:-1]).y_BSD)
    return nats_of(logits_BSV, tokens_BS[:, 1:])[:, prompt - 1 :].sum(axis=1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def by_tokens(
    graphdef: nnx.GraphDef, recurrence: int, slots: int, prompt: int, params: Any, tokens_BS: Any, state_LD: Any
):
    """The same over a cache."""
    model, rows = nnx.merge(graphdef, params), tokens_BS.shape[0]
    lengths_B = jnp.full(rows, prompt)
    thought = think_prompts(model, Depth(recurrence, None, slots), tokens_BS[:, :prompt], lengths_B, state_LD)

    def one(now: Any, place: Any) -> Any:
        cache, nats_B = now
        token_B1, index_B1 = lax.dynamic_slice_in_dim(tokens_BS, place, 1, axis=1), jnp.full((rows, 1), place)
        logits_B1V, cache = read(model, cache, token_B1, index_B1, state_LD, recurrence, slots)
        next_B1 = lax.dynamic_slice_in_dim(tokens_BS, place + 1, 1, axis=1)
        return (cache, nats_B + nats_of(logits_B1V, next_B1)[:, 0]), None

    first_B = nats_of(thought.logits_BV[:, None], tokens_BS[:, prompt : prompt + 1])[:, 0]
    places = jnp.arange(prompt, tokens_BS.shape[1] - 1)
    return lax.scan(one, (thought.cache, first_B), places)[0][1]


def nats_of(logits_BSV: jax.Array, next_BS: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BSV), next_BS[..., None], axis=-1)[..., 0]


def ratio(nats_B: np.ndarray, bytes_B: np.ndarray) -> tuple[float, float]:
    """Bits per byte over all pieces, and its standard error over them (ratio estimator)."""
    bits_B = nats_B / np.log(2)
    value = bits_B.sum() / bytes_B.sum()
    spread = np.std(bits_B - value * bytes_B, ddof=1) / np.mean(bytes_B)
    return float(value), float(spread / np.sqrt(len(bits_B)))


if __name__ == "__main__":
    run_verb(main)
