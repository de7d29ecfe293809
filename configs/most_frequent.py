"""A task that does not need depth: the most frequent letter. Everything else is configs/shell_game.py.

    python train_jax.py --config configs/most_frequent.py

Hardware: any.
Expected result: 0.98 of the answers to 1 to 12 letters are right with 1 recurrence, 1.00 with 2.
"""

import dataclasses

from shell_game import get_config as get_shell_game

from jax_huginn.config.schema import Config


def get_config() -> Config:
    config = get_shell_game()
    return dataclasses.replace(
        config,
        run_dir="runs/most_frequent",
        model=dataclasses.replace(config.model, vocab_size=7),
        data=dataclasses.replace(config.data, task="most_frequent"),
    )
