"""The generated task `shell_game` for lm-eval: which of five cups hides the ball after so many swaps?"""

from typing import TYPE_CHECKING, Any

from jax_huginn.data.permutation import HELD_OUT, random_bits
from jax_huginn.data.tasks import ShellGame

if TYPE_CHECKING:
    from datasets import DatasetDict

LEVELS = range(1, 33)  # swaps
QUESTIONS = 16  # of each number of swaps
SEED = 1  # validation has 0


def dataset(**_: Any) -> "DatasetDict":
    """`shell_game` for lm-eval, which passes the task's metadata."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(questions())})


def questions() -> list[dict[str, Any]]:
    """Rows of `swaps`, `context`, which ends with `=`, `choices` and `answer`, the index of the right one."""
    game, rows = ShellGame(), []
    for swaps in LEVELS:
        for number in range(QUESTIONS):
            bits = random_bits(game.longest(swaps), SEED, HELD_OUT, swaps, number)
            example = game.example(iter(bits.tolist()), swaps)
            context = "".join(game.alphabet[token] for token in example[1:-1])
            rows.append({"swaps": swaps, "context": context, "choices": [*"12345"], "answer": example[-1]})
    return rows
