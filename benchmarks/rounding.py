"""What rounding does to a model that thinks in depth: states and logits against float64, by recurrences; JSON lines.

    python benchmarks/rounding.py runs/moe --text README.md           # a run, on the first rows of a text
    python benchmarks/rounding.py --config configs/moe_700m.py        # fresh weights of a preset, on random tokens

All start from the same weights and the same s_0. bfloat16 is what training computes in, fp8 what it computes in with
`compute.fp8`: 8-bit matmuls in the recurrences and bfloat16 in the rest. Distances are relative L2, `kl` is that of
the predictions from float64's in nats, `agree` the share of tokens whose most likely next token is float64's, and
`nats` the mean cross-entropy less float64's.
"""

import argparse
import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.common import parse, report
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.config.checks import require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.data.tokenizer import load_tokenizer
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.model.parameters import fp8_copies, with_copies


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run, read on --text")
    parser.add_argument("--text", type=Path, help="a file")
    parser.add_argument("--config", help="a preset, in the place of a run; --section.field changes it")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    options, overrides = parse(parser)
    require((options.run is None) != (options.config is None), "name a run or a --config, one of the two")
    shape = (options.rows, options.length + 1)
    count = math.prod(shape)
    if options.run:
        require(options.text is not None, "a run reads a --text")
        model = load_checkpoint(options.run)
        tokens = load_tokenizer(str(options.run / "tokenizer")).encode(options.text.read_text())
        require(len(tokens) >= count, f"--text {options.text} has only {len(tokens)} tokens: give fewer --rows")
        rows = np.asarray(tokens[:count], np.int32).reshape(shape)
    else:
        model = jax.jit(lambda: MoEHuginnModel(override(load_config(options.config), overrides)))()
        rows = np.random.default_rng(0).integers(0, model.config.model.vocab_size, shape).astype(np.int32)
    case = {"benchmark": "rounding", "model": str(options.run or options.config), "rows": len(rows)}
    exact = read(model, rows, options.depths, "float64")
    for name, dtype, fp8 in (("bfloat16", "bfloat16", False), ("fp8", "bfloat16", True)):
        found = read(model, rows, options.depths, dtype, fp8)
        for depth, one, reference in zip(options.depths, found, exact, strict=True):
            errors = jax.device_get(compared(one, reference, rows[:, 1:]))
            report(**case, type=name, depth=depth, **{key: float(value) for key, value in errors.items()})


def read(model: MoEHuginnModel, rows: np.ndarray, depths: list[int], dtype: Any, fp8: bool = False) -> list[Any]:
    """The state (B,S,D) and the log-probabilities (B,S,V) after each depth, computed in a type."""
    config = dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, dtype=dtype))
    graphdef = functional.split(nnx.eval_shape(lambda: MoEHuginnModel(config)))[0]
    params = functional.params_of(model)
    state = jnp.asarray(initializers.fixed_state(0, rows.shape[1] - 1, config.model.width), dtype)
    found, before = [], 0
    for depth in depths:
        state, log_p = _read(graphdef, fp8, params, rows[:, :-1], state, depth - before)
        found.append((state, log_p))
        before = depth
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _read(graphdef: nnx.GraphDef, fp8: bool, params: Any, tokens_BS: jax.Array, state: jax.Array, steps: int) -> Any:
    model = nnx.merge(graphdef, params).cast()
    at = model.positions(tokens_BS.shape[1])
    injected_BSD, _, _ = model.inject(tokens_BS, at)
    weights = model.recurrent_weights()
    weights = with_copies(weights, fp8_copies(weights)) if fp8 else weights
    state_BSD = jnp.broadcast_to(state, injected_BSD.shape)
    state_BSD = lax.fori_loop(0, steps, lambda _, s: model.recur(injected_BSD, s, at, weights=weights)[0], state_BSD)
    return state_BSD, jax.nn.log_softmax(model.head(model.read_out(state_BSD, at)[1]), axis=-1)


@jax.jit
def compared(found: Any, exact: Any, labels_BS: jax.Array) -> dict[str, jax.Array]:
    (state, log_p), (exact_state, exact_log_p) = jax.tree.map(lambda x: x.astype(jnp.float64), (found, exact))
    centred, exact_centred = (each - each.mean(axis=-1, keepdims=True) for each in (log_p, exact_log_p))
    return {
        "state": jnp.linalg.norm(state - exact_state) / jnp.linalg.norm(exact_state),
        "logits": jnp.linalg.norm(centred - exact_centred) / jnp.linalg.norm(exact_centred),
        "kl": (jnp.exp(exact_log_p) * (exact_log_p - log_p)).sum(axis=-1).mean(),
        "agree": (log_p.argmax(-1) == exact_log_p.argmax(-1)).mean(),
        "nats": jnp.take_along_axis(exact_log_p - log_p, labels_BS[..., None], axis=-1).mean(),
    }


if __name__ == "__main__":
    run_verb(main)
