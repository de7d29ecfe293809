"""Accuracy on a generated task by recurrences and difficulty, and what exit criteria spend and cost.

    python benchmarks/generated_tasks.py runs/shell_game [RUN ...] >> benchmarks/results/shell_game.jsonl

A JSON line a run, for `plot_generated_tasks.py`. Every example is a row by itself, a newline in front, as a prompt has
it. The examples are the same for all runs on a task, `--examples` of each difficulty.

Three ways to exit, all by inference's own criteria. `exits`: all tokens of an example think until `=`, whose prediction
is the answer, exits. `exits_everywhere`: each token exits by itself, as in `generate`. `exits_after_prompt`: the tokens
before `=` think for all recurrences, then `=` is a new token over their cache and exits by itself.
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
from jax_huginn.inference import Exit, exits, generate
from jax_huginn.inference.batching import Schedule, begin, think_a_round
from jax_huginn.inference.thinking import Depth, think_prompts
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel

MOST = 64  # recurrences
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of which accuracy is kept for each difficulty
LEVELS = range(1, 33)  # difficulties
ROWS = 256  # examples at once
SEED = 17  # of the examples
RULES = {
    "kl < 5e-4": Exit("kl"),
    "kl < 1e-5": Exit("kl", 1e-5),
    "kl-entropy < 5e-4, 0.3": Exit("kl-entropy"),
    "kl-entropy < 1e-2, 0.3": Exit("kl-entropy", 1e-2),
    "latent-diff < 0.03": Exit("latent-diff"),
    "argmax-stability 5": Exit("argmax-stability"),
}
GENERATED = ("kl < 5e-4", "kl-entropy < 5e-4, 0.3")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="what a trained model is loaded from")
    parser.add_argument("--examples", type=int, default=32, help="of each difficulty (32)")
    parser.add_argument("--exits", choices=("none", "together", "all"), default="all", help="which ways to exit (all)")
    options, _ = parse(parser)
    for run in options.runs:
        report(**measure(load_checkpoint(run), options.examples, options.exits))


def measure(model: MoEHuginnModel, examples_each: int, exiting: str) -> dict[str, Any]:
    config = model.config
    task = TASKS[config.data.task]
    examples = [
        task.example(iter(random_bits(64, SEED, level, number).tolist()), level)
        for number in range(examples_each)
        for level in LEVELS
    ]
    level_T = np.tile(LEVELS, examples_each)
    parts = [examples[begin : begin + ROWS] for begin in range(0, len(examples), ROWS)]
    answer_T = np.array([example[-1] for example in examples])
    best_RT, steps = curves(model, parts)
    right_RT = best_RT == answer_T
    found = {
        "benchmark": config.data.task,
        "experts": config.moe.experts,
        "mean": config.recurrence.mean,
        "curriculum_rows": config.data.curriculum_rows,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "difficulty": config.data.difficulty,
        "examples": examples_each,
        "difficulties": list(LEVELS),
        "accuracy": {r: by_level(right_RT[r - 1], level_T) for r in SHOWN},
        "accuracy_by_r": np.round(right_RT.mean(1), 4).tolist(),
    }
    if exiting != "none":
        found["exits"] = {
            name: summary(steps_T, np.take_along_axis(right_RT, steps_T[None] - 1, axis=0)[0], level_T)
            for name, steps_T in steps.items()
        }
    if exiting == "all":
        for field, think in (("exits_everywhere", everywhere), ("exits_after_prompt", after_prompt)):
            thought = {name: think(model, parts, RULES[name]) for name in GENERATED}
            found[field] = {
                name: summary(steps_T, best_T == answer_T, level_T) for name, (steps_T, best_T) in thought.items()
            }
    return found


def by_level(values_T: np.ndarray, level_T: np.ndarray) -> list[float]:
    return [round(float(values_T[level_T == level].mean()), 4) for level in LEVELS]


def summary(steps_T: np.ndarray, right_T: np.ndarray, level_T: np.ndarray) -> dict[str, Any]:
    return {
        "steps": by_level(steps_T, level_T),
        "accuracy": by_level(right_T, level_T),
        "mean_steps": round(float(steps_T.mean()), 2),
        "mean_accuracy": round(float(right_T.mean()), 4),
    }


def padded(examples: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens without the answers, padded on the right, and their numbers."""
    tokens_BS = np.zeros((len(examples), max(map(len, examples)) - 1), np.int32)
    for row, example in enumerate(examples):
        tokens_BS[row, : len(example) - 1] = example[:-1]
    return tokens_BS, np.array([len(example) - 1 for example in examples], np.int32)


def curves(model: MoEHuginnModel, parts: list[list[list[int]]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The answer that every recurrence's read-out gives, (MOST, examples), and the exit of every rule, (examples,)."""
    graphdef, params = functional.split(model.cast())
    found = [jax.device_get(_curves(graphdef, params, *padded(part))) for part in parts]
    best_RT = np.concatenate([best_RB for best_RB, _ in found], axis=1)
    return best_RT, {name: np.concatenate([steps[name] for _, steps in found]) for name in RULES}


@partial(jax.jit, static_argnums=0)
def _curves(
    graphdef: nnx.GraphDef, params: Any, tokens_BS: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = nnx.merge(graphdef, params)
    rows, length = tokens_BS.shape
    at = model.positions(length)
    injected_BSD, _, _ = model.inject(tokens_BS, at)

    def last(x_BSD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BSD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    def recurrence(carry: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        state_BSD, memories, steps = carry
        state_BSD, _, _ = model.recur(injected_BSD, state_BSD, at)
        _, y_BSD, _ = model.read_out(state_BSD, at)
        logits_BV = model.head(last(y_BSD)[:, None])[:, 0]
        for name, rule in RULES.items():
            step_B = jnp.full(rows, step)
            done_B, memory = exits.decide(rule, step_B, last(state_BSD), logits_BV, memories[name])
            memories = memories | {name: memory}
            steps = steps | {name: jnp.where(done_B & (steps[name] == MOST), step_B, steps[name])}
        return (state_BSD, memories, steps), logits_BV.argmax(-1)

    start = initializers.fixed_state(0, length, model.config.model.width)
    state_BSD = jnp.broadcast_to(jnp.asarray(start, injected_BSD.dtype), injected_BSD.shape)
    vocabulary = model.config.model.vocab_size
    memories = {name: exits.begin(rule, last(state_BSD), vocabulary) for name, rule in RULES.items()}
    steps = dict.fromkeys(RULES, jnp.full(rows, MOST))
    (_, _, steps), best_RB = lax.scan(recurrence, (state_BSD, memories, steps), jnp.arange(1, MOST + 1))
    return best_RB, steps


def everywhere(model: MoEHuginnModel, parts: list[list[list[int]]], rule: Exit) -> tuple[np.ndarray, np.ndarray]:
    """Exits and answers of the last token of every example, where each token exits by itself."""
    made = [
        each
        for part in parts
        for each in generate(model, [example[:-1] for example in part], max_new_tokens=1, recurrence=MOST, exit=rule)[0]
    ]
    return np.array([each.steps[0] for each in made]), np.array([each.tokens[0] for each in made])


def after_prompt(model: MoEHuginnModel, parts: list[list[list[int]]], rule: Exit) -> tuple[np.ndarray, np.ndarray]:
    """The same, where the tokens before the last one think for all recurrences."""
    graphdef, params = functional.split(model.cast())
    found = [jax.device_get(_last_token(graphdef, rule, params, *padded(part))) for part in parts]
    return np.concatenate([steps_B for steps_B, _ in found]), np.concatenate([best_B for _, best_B in found])


@partial(jax.jit, static_argnums=(0, 1))
def _last_token(
    graphdef: nnx.GraphDef, rule: Exit, params: Any, tokens_BS: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    rows, length = tokens_BS.shape
    state_LD = jnp.asarray(initializers.fixed_state(0, length, model.config.model.width), model.config.model.dtype)
    prompt = think_prompts(model, Depth(MOST, None, MOST), tokens_BS, length_B - 1, state_LD)
    token_B = jnp.take_along_axis(tokens_BS, (length_B - 1)[:, None], axis=1)[:, 0]
    idle_B, start_B1D = jnp.zeros(rows, bool), state_LD[length_B - 1][:, None]
    last_token = begin(rule, start_B1D, model.config.model.vocab_size)
    last = think_a_round(
        model, Depth(MOST, rule, MOST), Schedule(one_in=1).of(rows), last_token, prompt.cache, token_B, length_B - 1,
        idle_B, jnp.zeros(rows, jnp.int32), start_B1D,
    )  # fmt: skip
    return last.in_flight.step_B1[:, 0], last.logits_BV.argmax(-1)


if __name__ == "__main__":
    run_verb(main)
