"""python -m jax_huginn.export RUN --out model.pth: write a checkpoint for PyTorch."""

from jax_huginn.config.cli import OneLineParser, run_verb


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one step folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .pth to write; an existing one is refused")
    options = parser.parse_args()

    from jax_huginn.interop.pth import write_pth
    from jax_huginn.training.checkpoint import find_step, load_checkpoint

    step = find_step(options.run)
    write_pth(load_checkpoint(step), options.out)
    print(f"wrote {options.out} from {step}")


if __name__ == "__main__":
    run_verb(main)
