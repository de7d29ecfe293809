"""What exit criteria spend and cost on held-out text: recurrences, bits per byte, and tokens that never exit.

    python benchmarks/text_exits.py runs/moe [RUN ...] >> benchmarks/results/text_exits.jsonl

A JSON line a run. All tokens think together to the limit, and each is scored by its prediction at its own exit, so a
criterion is judged by itself, without the keys and values of tokens that have left. Beside inference's own criteria
there are forms that ask of the prediction more than that it stays, but less than an entropy below 0.3 nat, which text
seldom reaches:

    kl-margin    KL(p_r || p_{r-1}) < t, and the most likely token leads the second by at least m in probability
    not-falling  H(p_{r-1}) - H(p_r) < t: the entropy no longer falls
    kl-rising    KL < t and the entropy does not fall at all
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import parse, report
from benchmarks.held_out import Readings, readings
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.pipeline import build_data

SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run on text, with its tokenizer")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows (128)")
    parser.add_argument("--limit", type=int, default=64, help="most recurrences (64)")
    options, _ = parse(parser)
    for run in options.runs:
        report(benchmark="text_exits", **measure(Path(run), options.rows, options.limit))


def measure(run: Path, rows: int, limit: int) -> dict[str, Any]:
    model = load_checkpoint(run)
    config = model.config
    config = dataclasses.replace(config, validation=dataclasses.replace(config.validation, sequences=rows))
    data = build_data(config, run / "tokenizer", report=lambda line: None)
    data.train.close()
    assert data.token_bytes is not None
    tokens_BS, labels_BS = (np.concatenate([batch[name] for batch in data.validation]) for name in ("tokens", "labels"))
    read = readings(model, tokens_BS, labels_BS, limit)
    learnt_BS = labels_BS >= 0
    nats_RT, count_bytes = read.nats[:, learnt_BS], int(data.token_bytes[labels_BS[learnt_BS]].sum())
    by_r = nats_RT.sum(axis=1) / np.log(2) / count_bytes

    rules = {}
    for name, holds_RBS in conditions(read).items():
        holds_RT = holds_RBS[:, learnt_BS]
        holds_RT[0] = False  # the first has nothing to compare with
        steps_T = np.where(holds_RT.any(axis=0), holds_RT.argmax(axis=0) + 1, limit)
        bits = np.take_along_axis(nats_RT, steps_T[None] - 1, axis=0).sum() / np.log(2) / count_bytes
        mean = steps_T.mean()
        rules[name] = {
            "steps": round(float(mean), 3),
            "to_limit": round(float(1 - holds_RT.any(axis=0).mean()), 4),
            "bits_per_byte": round(float(bits), 5),
            "fixed": round(float(np.interp(mean, np.arange(1, limit + 1), by_r)), 5),
        }
    return {
        "preset": run.name,
        "steps": config.train.steps,
        "mean": config.recurrence.mean,
        "tokens": int(learnt_BS.sum()),
        "bytes": count_bytes,
        "limit": limit,
        "bits_per_byte": {r: round(float(by_r[r - 1]), 5) for r in SHOWN if r <= limit},
        "entropy_below_0.3": round(float((read.entropy[-1][learnt_BS] < 0.3).mean()), 4),
        "rules": rules,
    }


def conditions(read: Readings) -> dict[str, np.ndarray]:
    """Where each criterion holds, (R,B,S)."""
    falls = -np.diff(read.entropy, axis=0, prepend=np.log(np.float32(1e9)))
    found = {}
    for t in (5e-2, 5e-3, 5e-4, 5e-5):
        close = read.kl < t
        found[f"kl < {t:g}"] = close
        found[f"kl-entropy < {t:g}, 0.3"] = close & (read.entropy < 0.3)
        found |= {f"kl-margin < {t:g}, {m:g}": close & (read.margin >= m) for m in (0.1, 0.5)}
        found[f"kl-rising < {t:g}"] = close & (falls <= 0)
    found |= {f"not-falling < {t:g}": falls < t for t in (1e-1, 1e-2, 1e-3)}
    found |= {f"latent-diff < {t:g}": read.change < t for t in (0.3, 0.1, 0.03, 0.01)}
    return found


if __name__ == "__main__":
    run_verb(main)
