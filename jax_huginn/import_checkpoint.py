"""python -m jax_huginn.import_checkpoint model.pth|HF_DIR --out RUN: make a run folder of weights from elsewhere."""

from pathlib import Path

from jax_huginn.config.cli import OneLineParser, run_verb


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.import_checkpoint", description=__doc__)
    parser.add_argument("weights", metavar="X", help=".pth file of the public layout, or a Hugging Face folder")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to create; an existing one is refused")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder, where X comes without one")
    options = parser.parse_args()

    from jax_huginn.checkpoints.import_run import import_weights
    from jax_huginn.interop.open_weights import open_weights

    weights = open_weights(options.weights)
    import_weights(weights, Path(options.out), options.tokenizer)
    print(f"wrote {options.out} from {options.weights}")


if __name__ == "__main__":
    run_verb(main)
