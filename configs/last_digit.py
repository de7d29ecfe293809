"""A task that does not need depth: the last digit of a sum. Everything else is configs/shell_game.py.

    python train_jax.py --config configs/last_digit.py

Hardware: any.
Expected result: 0.93 of the answers to 1 to 12 digits are right with 2 recurrences, 0.98 with 3, and no more with 64.
"""

import dataclasses

from shell_game import get_config as get_shell_game

from jax_huginn.config.schema import Config


def get_config() -> Config:
    config = get_shell_game()
    return dataclasses.replace(
        config,
        run_dir="runs/last_digit",
        model=dataclasses.replace(config.model, vocab_size=12),
        data=dataclasses.replace(config.data, task="last_digit"),
    )
