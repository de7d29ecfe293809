"""A second task that needs depth: products in the group S3. Everything else is configs/shell_game.py.

    python train_jax.py --config configs/products.py

Hardware: any.
Expected result: accuracy by recurrences and difficulty as in docs/experiments.md.
"""

import dataclasses

from shell_game import get_config as get_shell_game

from jax_huginn.config.schema import Config


def get_config() -> Config:
    config = get_shell_game()
    return dataclasses.replace(
        config,
        run_dir="runs/products",
        model=dataclasses.replace(config.model, vocab_size=7),
        data=dataclasses.replace(config.data, task="products"),
    )
