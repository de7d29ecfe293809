"""Train a MoE-Huginn: python train_jax.py --config configs/moe.py [--section.field value ...]"""

import sys

from jax_huginn.config.cli import parse_config, run_verb


def main() -> None:
    config = parse_config(sys.argv[1:])

    # After parsing, so that --help and a mistyped option answer without waiting for JAX.
    from jax_huginn.training.loop import train
    from jax_huginn.training.startup import prepare_process

    prepare_process(config)
    train(config)


if __name__ == "__main__":
    run_verb(main)
