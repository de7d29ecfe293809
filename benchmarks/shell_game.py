"""Accuracy of shell game runs by recurrences and difficulty, and what exit criteria spend and cost.

    python benchmarks/shell_game.py runs/shell_game [RUN ...] >> benchmarks/results/shell_game.jsonl

A JSON line a run, for `plot_shell_game.py`. Every game is a row by itself, a newline in front, as a prompt has it. The
games are the same for all runs, `--games` of each number of swaps.

`exits`: the prompt up to `=` is computed at full depth, then `=` as a new token of every row, which exits by itself and
whose prediction is the answer. `exits_everywhere`: the tokens of the prompt exit too, each by itself, as in `generate`.
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
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.permutation import random_bits
from jax_huginn.data.tasks import TASKS
from jax_huginn.inference import Exit, generate
from jax_huginn.inference.thinking import Depth, think_prompts, think_tokens
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel

MOST = 64  # recurrences
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of which accuracy is kept for each number of swaps
LEVELS = range(1, 33)  # swaps
ROWS = 256  # games at once
SEED = 17  # of the games
RULES = {
    "kl < 5e-4": Exit("kl"),
    "kl < 1e-5": Exit("kl", 1e-5),
    "kl-entropy < 5e-4, 0.3": Exit("kl-entropy"),
    "kl-entropy < 1e-2, 0.3": Exit("kl-entropy", 1e-2),
    "latent-diff < 0.03": Exit("latent-diff"),
    "argmax-stability 5": Exit("argmax-stability"),
}
EVERYWHERE = ("kl < 5e-4", "kl-entropy < 5e-4, 0.3")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="what a trained model is loaded from")
    parser.add_argument("--games", type=int, default=64, help="of each number of swaps (64)")
    options, _ = parse(parser)
    for run in options.runs:
        report(benchmark="shell_game", **measure(load_checkpoint(run), options.games))


def measure(model: MoEHuginnModel, games: int) -> dict[str, Any]:
    config = model.config
    task = TASKS[config.data.task]
    examples = [
        task.example(iter(random_bits(64, SEED, level, number).tolist()), level)
        for number in range(games)
        for level in LEVELS
    ]
    level_T = np.tile(LEVELS, games)
    parts = [examples[begin : begin + ROWS] for begin in range(0, len(examples), ROWS)]
    right_RT = np.concatenate([curves(model, part) for part in parts], axis=1)
    return {
        "experts": config.moe.experts,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "difficulty": config.data.difficulty,
        "games": games,
        "swaps": list(LEVELS),
        "accuracy": {r: by_level(right_RT[r - 1], level_T) for r in SHOWN},
        "accuracy_by_r": np.round(right_RT.mean(1), 4).tolist(),
        "exits": {name: exits(model, parts, rule, level_T) for name, rule in RULES.items()},
        "exits_everywhere": {name: exits_everywhere(model, parts, RULES[name], level_T) for name in EVERYWHERE},
    }


def by_level(values_T: np.ndarray, level_T: np.ndarray) -> list[float]:
    return [round(float(values_T[level_T == level].mean()), 4) for level in LEVELS]


def summary(steps_T: np.ndarray, right_T: np.ndarray, level_T: np.ndarray) -> dict[str, Any]:
    return {
        "steps": by_level(steps_T, level_T),
        "accuracy": by_level(right_T, level_T),
        "mean_steps": round(float(steps_T.mean()), 2),
        "mean_accuracy": round(float(right_T.mean()), 4),
    }


def padded(examples: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens without the answers, padded on the right; their numbers; the answers."""
    length_B = np.array([len(example) - 1 for example in examples], np.int32)
    tokens_BS = np.zeros((len(examples), max(LEVELS) + 3), np.int32)
    for row, example in enumerate(examples):
        tokens_BS[row, : len(example) - 1] = example[:-1]
    return tokens_BS, length_B, np.array([example[-1] for example in examples])


def curves(model: MoEHuginnModel, examples: list[list[int]]) -> np.ndarray:
    """Whether every recurrence's read-out has the answer of every game, (MOST, games) bool."""
    tokens_BS, length_B, answer_B = padded(examples)
    return np.asarray(_answers(*functional.split(model.cast()), tokens_BS, length_B)) == answer_B


@partial(jax.jit, static_argnums=0)
def _answers(graphdef: nnx.GraphDef, params: Any, tokens_BS: jax.Array, length_B: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    at = model.positions(tokens_BS.shape[1])
    injected_BSD, _, _ = model.inject(tokens_BS, at)
    start = initializers.fixed_state(0, tokens_BS.shape[1], model.config.model.width)

    def recurrence(state_BSD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        state_BSD, _, _ = model.recur(injected_BSD, state_BSD, at)
        _, y_BSD, _ = model.read_out(state_BSD, at)
        y_B1D = jnp.take_along_axis(y_BSD, (length_B - 1)[:, None, None], axis=1)
        return state_BSD, model.head(y_B1D)[:, 0].argmax(-1)

    state_BSD = jnp.broadcast_to(jnp.asarray(start, injected_BSD.dtype), injected_BSD.shape)
    return lax.scan(recurrence, state_BSD, None, length=MOST)[1]


def exits(model: MoEHuginnModel, parts: list[list[list[int]]], rule: Exit, level_T: np.ndarray) -> dict[str, Any]:
    graphdef, params = functional.split(model.cast())
    steps, right = [], []
    for part in parts:
        tokens_BS, length_B, answer_B = padded(part)
        steps_B, best_B = _last_token(graphdef, rule, params, tokens_BS, length_B)
        steps.append(np.asarray(steps_B))
        right.append(np.asarray(best_B) == answer_B)
    return summary(np.concatenate(steps), np.concatenate(right), level_T)


@partial(jax.jit, static_argnums=(0, 1))
def _last_token(
    graphdef: nnx.GraphDef, rule: Exit, params: Any, tokens_BS: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Recurrences of the last token of every row, which alone exits, and its prediction."""
    model = nnx.merge(graphdef, params)
    rows, length = tokens_BS.shape
    state_LD = jnp.asarray(initializers.fixed_state(0, length, model.config.model.width), model.config.model.dtype)
    prompt = think_prompts(model, Depth(MOST, None, MOST), tokens_BS, length_B - 1, state_LD)
    token_B = jnp.take_along_axis(tokens_BS, (length_B - 1)[:, None], axis=1)[:, 0]
    idle_B = jnp.zeros(rows, bool)
    start_B1D = state_LD[length_B - 1][:, None]
    thought = think_tokens(model, Depth(MOST, rule, MOST), prompt.cache, token_B, length_B - 1, idle_B, start_B1D)
    return thought.steps_B, thought.logits_BV.argmax(-1)


def exits_everywhere(
    model: MoEHuginnModel, parts: list[list[list[int]]], rule: Exit, level_T: np.ndarray
) -> dict[str, Any]:
    made = [
        each
        for part in parts
        for each in generate(model, [game[:-1] for game in part], max_new_tokens=1, recurrence=MOST, exit=rule)[0]
    ]
    answers = np.array([game[-1] for part in parts for game in part])
    right_T = np.array([each.tokens[0] for each in made]) == answers
    return summary(np.array([each.steps[0] for each in made], float), right_T, level_T)


if __name__ == "__main__":
    run_verb(main)
