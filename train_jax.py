"""Train a MoE-Huginn: python train_jax.py --config configs/moe.py [--section.field value ...]"""

import os
import sys

from jax_huginn.config.cli import parse_config, run_verb


def main() -> None:
    config = parse_config(sys.argv[1:])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # JAX's own 0.75 is for a GPU that is shared

    # After parsing, so that --help and a mistyped option answer without waiting for JAX.
    from jax_huginn.training.host_memory import keep_freed_memory

    keep_freed_memory()
    from jax_huginn.training.loop import train

    train(config)


if __name__ == "__main__":
    run_verb(main)
