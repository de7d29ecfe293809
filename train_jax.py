"""Train a MoE-Huginn: python train_jax.py --config configs/moe.py [--section.field value ...]"""

from jax_huginn.config.cli import main
from jax_huginn.config.schema import Config


def run(config: Config) -> None:
    # After parsing, so that --help and a mistyped option answer without waiting for JAX.
    from jax_huginn.training.loop import train

    train(config)


if __name__ == "__main__":
    main(run)
