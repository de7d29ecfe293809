"""python -m jax_huginn.evaluate SOURCE --tasks NAMES --recurrence 1,4,8: lm-eval scores at several depths.

Besides lm-eval's own tasks there are three that need no network: stdlib_continuation and stdlib_perplexity, and
shell_game for a model of configs/shell_game.py.
Every task is evaluated by itself: one that cannot run is reported and costs no other.
Exit status: 0 all tasks ran, 1 some did not, 2 nothing was started because of a mistake in the command.
"""

import argparse
import sys

from eval_tasks.identity import Opened
from eval_tasks.loading import load_tokenizer
from eval_tasks.run import run
from jax_huginn.config.checks import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )
    parser.add_argument(
        "--tokenizer_path", metavar="DIR", help="folder or hub name that AutoTokenizer loads; by default the source's"
    )


def open_model(options: argparse.Namespace) -> Opened:
    """The model and its tokenizer; raises UserError when they cannot be read."""
    import jax

    from jax_huginn.checkpoints.digest import files_of_weights
    from jax_huginn.checkpoints.sources import load_for_inference, open_source
    from jax_huginn.inference.evaluation import JaxLanguageModel

    source = open_source(options.source)
    tokenizer = options.tokenizer_path or source.tokenizer
    if tokenizer is None:
        raise UserError(f"--tokenizer_path is needed: {source.path} comes without a tokenizer")
    loaded = load_tokenizer(str(tokenizer), "--tokenizer_path")
    if "float64" in (options.dtype, source.config.model.dtype):
        jax.config.update("jax_enable_x64", True)
    model = JaxLanguageModel(load_for_inference(source, options.dtype))
    return Opened(model, loaded, source.path, [*files_of_weights(source.path)])


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run("python -m jax_huginn.evaluate", __doc__ or "", given, add_options, open_model)


if __name__ == "__main__":
    sys.exit(main())
