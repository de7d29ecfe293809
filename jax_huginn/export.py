"""python -m jax_huginn.export RUN --out model.pth|DIR: write a checkpoint for PyTorch or a Hugging Face folder."""

from pathlib import Path

from jax_huginn.config.cli import OneLineParser, run_verb


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one step folder")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a .pth file, or a folder to create; an existing one is refused"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float64"), help="type of the tensors; the weights' own if not given"
    )
    options = parser.parse_args()

    from jax_huginn.checkpoints.load import find_step, load_step
    from jax_huginn.interop.errors import ExportError, check_target
    from jax_huginn.interop.huggingface import write_huggingface
    from jax_huginn.interop.pth import write_pth

    out, step = Path(options.out), find_step(options.run)
    check_target(out)  # before the model is loaded, which may take a while
    if out.suffix == ".pth":
        write_pth(load_step(step), out, options.dtype)
    elif out.suffix in (".pt", ".bin", ".ckpt", ".safetensors"):
        raise ExportError(f"--out {out} is neither a .pth file nor a folder")
    else:
        tokenizer = step.parent.parent / "tokenizer"
        write_huggingface(load_step(step), out, tokenizer if tokenizer.is_dir() else None, options.dtype)
    print(f"wrote {out} from {step}")


if __name__ == "__main__":
    run_verb(main)
