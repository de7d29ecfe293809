"""Held-out bits per byte of a run by recurrences, and its routing, on the rows that `token_rows.py` made.

    python benchmarks/held_out.py RUN --setting dense

Writes RUN/held_out.json, a line of results, and RUN/held_out.npz, the nats of every row after every recurrence.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.common import case_line, parse
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.tokenizer import load_tokenizer, token_bytes
from jax_huginn.model import functional, initializers
from jax_huginn.model.flops import training_flops
from jax_huginn.model.huginn import MoEHuginnModel

ROWS = 16  # at once
MOST = 32  # recurrences


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--setting", required=True, help="name of it in the results")
    options, _ = parse(parser)
    measure(options.run, options.setting)


def measure(run: Path, setting: str) -> None:
    """Write the files of a run."""
    model = load_checkpoint(run)
    config = model.config
    rows, documents = held_out_rows(config.data.validation_path)
    bytes_V = token_bytes(load_tokenizer(str(run / "tokenizer")), config.model.vocab_size)
    tokens_BS, labels_BS = rows[:, :-1], rows[:, 1:]
    nats_RB = readings(model, tokens_BS, labels_BS, MOST).nats.sum(axis=2)
    bytes_B = bytes_V[labels_BS].sum(axis=1)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    line = {
        "setting": setting,
        "seed": config.train.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(functional.params_of(model))),
        "training_flops_per_token": training_flops(config, 5, 4),
        "tokens": config.train.steps * config.train.batch_size * config.train.sequence_length,
        "tokens_per_second": round(float(np.median(speeds))),
        "documents": len(rows),
        "bytes": int(bytes_B.sum()),
        "bits_per_byte": [round(ratio(each, bytes_B)[0], 5) for each in nats_RB],
        "standard_error": [round(ratio(each, bytes_B)[1], 5) for each in nats_RB],
        "less_than_one_recurrence": [round(ratio(nats_RB[0] - each, bytes_B)[0], 5) for each in nats_RB],
        "less_standard_error": [round(ratio(nats_RB[0] - each, bytes_B)[1], 5) for each in nats_RB],
    }
    if config.moe.experts:
        line["routing"] = routing(model, tokens_BS, documents)
    np.savez(run / "held_out.npz", nats_RB=nats_RB, bytes_B=bytes_B)
    (run / "held_out.json").write_text(case_line(benchmark="real_text", **line) + "\n")


def held_out_rows(path: str) -> tuple[np.ndarray, list[str]]:
    """Token rows (B,S+1) int32 and the path of each one's document, as `token_rows.py` writes them."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    tokens = table["input_ids"].combine_chunks().flatten().to_numpy().astype(np.int32)
    return tokens.reshape(len(table), -1), table["document"].to_pylist()


def ratio(nats_B: np.ndarray, bytes_B: np.ndarray) -> tuple[float, float]:
    """Bits per byte over all rows, and its standard error over them as independent samples (ratio estimator)."""
    bits_B = nats_B / np.log(2)
    value = bits_B.sum() / bytes_B.sum()
    spread = np.std(bits_B - value * bytes_B, ddof=1) / np.mean(bytes_B)
    return float(value), float(spread / np.sqrt(len(bits_B)))


def routing(model: Any, tokens_BS: np.ndarray, documents: list[str]) -> dict[str, Any]:
    """How the router spreads the held-out tokens over the experts: as a whole, by top folder, by recurrence.

    `specialisation` is the mean over tokens of the total variation distance between the shares of their folder's
    tokens and those of all tokens: 0 if folders are routed alike. Folders of fewer than 16 documents are left out.
    """
    tops = np.array([document.split("/")[0] for document in documents])
    counts, entropies, sizes = {}, {}, {}
    for top in sorted(set(tops.tolist())):
        own = tokens_BS[tops == top]
        if len(own) >= ROWS:
            counts[top], entropies[top] = choices(model, own, MOST)
            sizes[top] = len(own)
    weights = np.array([sizes[top] for top in counts]) / sum(sizes.values())
    shares = np.array([each / each.sum(axis=-1, keepdims=True) for each in counts.values()])  # (folders, [R,] E)
    every = np.tensordot(weights, shares, axes=1)
    far = np.abs(shares - every).sum(axis=-1) / 2
    entropy = np.tensordot(weights, np.array(list(entropies.values())), axes=1)
    found = {
        "folders": sizes,
        "specialisation": np.tensordot(weights, far, axes=1).round(4).tolist(),
        "entropy": np.round(entropy, 4).tolist(),
        "shares": every.round(4).tolist(),
    }
    if every.ndim == 2:  # in the core: recurrences on the first axis
        found["moved_by_recurrence"] = (np.abs(np.diff(every, axis=0)).sum(axis=-1) / 2).round(4).tolist()
    return found


# ---- What a model says after every recurrence ------------------------------------------------------------------------


class Readings(NamedTuple):
    """All tokens think together from the fixed start; recurrences 1 to R are read out, (R,B,S) in JAX or NumPy."""

    nats: Any
    """Cross-entropy of the label; 0 where that is ignored."""
    kl: Any
    """KL(p_r || p_{r-1}) in nats; p_0 is uniform."""
    entropy: Any
    """Of p_r, nats."""
    margin: Any
    """Probability of the most likely token less that of the second."""
    change: Any
    """||s_r - s_{r-1}|| / ||s_r||."""


class Choices(NamedTuple):
    """What the router chose; arrays have a leading axis of the recurrences if the MoE is in the core."""

    counts: np.ndarray
    """Assignments to each expert, (...,E)."""
    entropy: np.ndarray
    """Mean over the tokens of the full softmax's entropy, (...), nats."""


def readings(model: MoEHuginnModel, tokens_BS: np.ndarray, labels_BS: np.ndarray, most: int) -> Readings:
    graphdef, params = functional.split(model.cast())
    parts = [slice(begin, begin + ROWS) for begin in range(0, len(tokens_BS), ROWS)]
    found = [jax.device_get(_read(graphdef, most, params, tokens_BS[part], labels_BS[part])) for part in parts]
    return Readings(*(np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True)))


def choices(model: MoEHuginnModel, tokens_BS: np.ndarray, most: int) -> Choices:
    graphdef, params = functional.split(model.cast())
    parts = [tokens_BS[begin : begin + ROWS] for begin in range(0, len(tokens_BS), ROWS)]
    found = [jax.device_get(_choose(graphdef, most, params, part)) for part in parts]
    rows = [len(part) / len(tokens_BS) for part in parts]
    entropy = sum(share * entropy for share, (_, entropy) in zip(rows, found, strict=True))
    return Choices(np.sum([counts for counts, _ in found], axis=0), np.asarray(entropy))


@partial(jax.jit, static_argnums=(0, 1))
def _read(graphdef: nnx.GraphDef, most: int, params: Any, tokens_BS: jax.Array, labels_BS: jax.Array) -> Readings:
    model: MoEHuginnModel = nnx.merge(graphdef, params)
    at = model.positions(tokens_BS.shape[1])
    injected_BSD, _, _ = model.inject(tokens_BS, at)
    label_BS1 = jnp.maximum(labels_BS, 0)[..., None]

    def recurrence(carry: tuple[jax.Array, jax.Array], inputs: None) -> Any:
        before_BSD, before_BSV = carry
        state_BSD, _, _ = model.recur(injected_BSD, before_BSD, at)
        _, y_BSD, _ = model.read_out(state_BSD, at)
        log_p_BSV = jax.nn.log_softmax(model.head(y_BSD), axis=-1)
        p_BSV = jnp.exp(log_p_BSV)
        two_BS2 = lax.top_k(p_BSV, 2)[0]
        state, before = (each.astype(log_p_BSV.dtype) for each in (state_BSD, before_BSD))
        read = Readings(
            nats=-jnp.where(labels_BS < 0, 0, jnp.take_along_axis(log_p_BSV, label_BS1, axis=-1)[..., 0]),
            kl=jnp.sum(p_BSV * (log_p_BSV - before_BSV), axis=-1),
            entropy=-jnp.sum(p_BSV * log_p_BSV, axis=-1),
            margin=two_BS2[..., 0] - two_BS2[..., 1],
            change=jnp.linalg.norm(state - before, axis=-1) / jnp.linalg.norm(state, axis=-1),
        )
        return (state_BSD, log_p_BSV), read

    vocabulary = model.config.model.vocab_size
    uniform_BSV = jnp.full((*tokens_BS.shape, vocabulary), -jnp.log(vocabulary), jnp.float32)
    return lax.scan(recurrence, (_start(model, injected_BSD), uniform_BSV), length=most)[1]


@partial(jax.jit, static_argnums=(0, 1))
def _choose(graphdef: nnx.GraphDef, most: int, params: Any, tokens_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    model: MoEHuginnModel = nnx.merge(graphdef, params)
    at = model.positions(tokens_BS.shape[1])
    injected_BSD, routing, _ = model.inject(tokens_BS, at)

    def recurrence(state_BSD: jax.Array, inputs: None) -> Any:
        state_BSD, routing, _ = model.recur(injected_BSD, state_BSD, at)
        return state_BSD, routing

    if routing is None:
        _, routing = lax.scan(recurrence, _start(model, injected_BSD), length=most)
    return routing.counts_E, routing.entropy


def _start(model: MoEHuginnModel, injected_BSD: jax.Array) -> jax.Array:
    start_SD = jnp.asarray(initializers.fixed_state(0, injected_BSD.shape[1], injected_BSD.shape[2]))
    return jnp.broadcast_to(start_SD, injected_BSD.shape).astype(injected_BSD.dtype)


if __name__ == "__main__":
    run_verb(main)
