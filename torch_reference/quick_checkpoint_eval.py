"""Evaluate an exported checkpoint with lm-eval, in PyTorch.

    python torch_reference/quick_checkpoint_eval.py --checkpoint_name model.pth --tokenizer_path DIR \
        --tasks "arc_easy,hellaswag,tinyMMLU" --recurrence 8 --batch_size 16

Besides lm-eval's own tasks there are three that need no network: stdlib_continuation and stdlib_perplexity, and
shell_game for a model of configs/shell_game.py.
Every task is evaluated by itself: one that cannot run is reported and costs no other.
Exit status: 0 all tasks ran, 1 some did not, 2 nothing was started because of a mistake in the command.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the clone's root importable in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval_tasks.identity import Opened
from eval_tasks.loading import load_tokenizer
from eval_tasks.progress import reading
from eval_tasks.run import UserError, run


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint_name", required=True, metavar="PATH", type=_existing,
        help="an exported .pth file or Hugging Face folder",
    )  # fmt: skip
    add("--tokenizer_path", metavar="DIR", help="folder or hub name that AutoTokenizer loads; by default the folder's")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")


def open_model(options: argparse.Namespace) -> Opened:
    """The checkpoint and its tokenizer; raises UserError when they cannot be read."""
    import torch

    from torch_reference.checkpoint import CheckpointError, load_checkpoint
    from torch_reference.evaluation import TorchLanguageModel

    path = options.checkpoint_name
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    tokenizer = load_tokenizer(options.tokenizer_path or _beside(path), "--tokenizer_path")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    with reading(str(path)):
        try:
            model = load_checkpoint(path)
        except CheckpointError as error:
            raise UserError(str(error)) from None
        model = model.to(device, getattr(torch, options.dtype) if options.dtype else None)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), path / "config.json"]
    return Opened(TorchLanguageModel(model), tokenizer, path, files)


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return Path(text)


def _beside(path: Path) -> str:
    """The tokenizer in a Hugging Face folder, or in `tokenizer/` beside a file, as in a run folder."""
    folder = path if path.is_dir() else path.parent / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer_path is needed: {folder} holds no tokenizer")
    return str(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run("quick_checkpoint_eval", __doc__ or "", given, add_options, open_model)


if __name__ == "__main__":
    sys.exit(main())
