"""python -m jax_huginn.export SOURCE --out model.pth|DIR: write a model for PyTorch or as a Hugging Face folder."""

from pathlib import Path

from jax_huginn.config.cli import OneLineParser, run_verb


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.export", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a .pth file, or a folder to create; an existing one is refused"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float64"), help="type of the tensors; the weights' own if not given"
    )
    options = parser.parse_args()

    from jax_huginn.checkpoints.sources import open_and_load, open_source
    from jax_huginn.interop.errors import ExportError, check_target
    from jax_huginn.interop.huggingface import write_huggingface
    from jax_huginn.interop.pth import write_pth

    out = Path(options.out)
    open_source(options.source)  # mistakes are reported before the model is loaded, which may take a while
    check_target(out)
    if out.suffix in (".pt", ".bin", ".ckpt", ".safetensors"):
        raise ExportError(f"--out {out} is neither a .pth file nor a folder")
    source, model = open_and_load(options.source)
    if out.suffix == ".pth":
        write_pth(model, out, options.dtype)
    else:
        write_huggingface(model, out, source.tokenizer, options.dtype)
    print(f"wrote {out} from {source.path}")


if __name__ == "__main__":
    run_verb(main)
