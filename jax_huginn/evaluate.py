"""python -m jax_huginn.evaluate SOURCE --tasks NAMES --recurrence 1,4,8: lm-eval scores at several depths.

Besides lm-eval's own tasks there are three that need no network: stdlib_continuation and stdlib_perplexity, and
shell_game for a model of configs/shell_game.py.
Every task is evaluated by itself: one that cannot run is reported and costs no other.
Exit status: 0 all tasks ran, 1 some did not, 2 nothing was started because of a mistake in the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from eval_tasks.identity import Exiting, Opened
from eval_tasks.loading import load_tokenizer
from eval_tasks.progress import reading
from eval_tasks.run import run
from jax_huginn.config.checks import UserError

if TYPE_CHECKING:
    from jax_huginn.inference.exits import Exit


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )
    parser.add_argument(
        "--tokenizer_path", metavar="DIR", help="folder or hub name that AutoTokenizer loads; by default the source's"
    )
    add = parser.add_argument
    add("--exit", metavar="NAME", help="score with exits: every token ends by this criterion, or after --recurrence")
    add("--exit_threshold", metavar="T[,T...]", help="its threshold, or several to compare (the criterion's own)")
    add("--exit_entropy", type=float, metavar="H", help="largest entropy at which kl-entropy exits, nats (0.3)")
    add("--exit_every", type=int, metavar="M", help="test at every M-th recurrence (1)")
    add("--min_steps", type=int, metavar="N", help="recurrences before which no token exits (1)")
    add("--cache.policy", dest="policy", default="full", metavar="POLICY",
        help="in tasks that generate: recurrences with own keys and values. full: all. mod: --cache.budget. "
        "last: one (full)")  # fmt: skip
    add("--cache.budget", dest="budget", type=int, default=0, metavar="SLOTS", help="with --cache.policy mod")
    add("--parallel.data", dest="data", type=int, default=1, metavar="N",
        help="devices over which the sequences are spread; -1: all (1)")  # fmt: skip


def open_model(options: argparse.Namespace) -> Opened:
    """The model and its tokenizer; raises UserError when they cannot be read."""
    import jax

    from jax_huginn.checkpoints.digest import files_of_weights
    from jax_huginn.checkpoints.sources import load_for_inference, open_source
    from jax_huginn.inference.cache import slots_of
    from jax_huginn.inference.evaluation import JaxLanguageModel
    from jax_huginn.parallel.mesh import first_devices, replicated_on

    rules = exits_of(options)
    slots_of(options.policy, options.budget, 1)
    devices = first_devices(options.data)
    source = open_source(options.source)
    tokenizer = options.tokenizer_path or source.tokenizer
    if tokenizer is None:
        raise UserError(f"--tokenizer_path is needed: {source.path} comes without a tokenizer")
    loaded = load_tokenizer(str(tokenizer), "--tokenizer_path")
    if "float64" in (options.dtype, source.config.model.dtype):
        jax.config.update("jax_enable_x64", True)
    with reading(str(source.path)):
        weights = load_for_inference(source, options.dtype, replicated_on(devices))
    model = JaxLanguageModel(weights, None, options.policy, options.budget, devices)
    exits = [Exiting(name, model.exiting(rule), dataclasses.asdict(rule)) for name, rule in rules.items()]
    files = [*files_of_weights(source.path)]
    return Opened(model, loaded, source.path, files, exits, options.policy, options.budget)


def exits_of(options: argparse.Namespace) -> dict[str, Exit]:
    """The criteria that the options ask for, by name; the threshold is in the name where there are several.

    Raises:
        UserError: an unknown criterion, or options that cannot work.
    """
    from jax_huginn.inference.exits import Exit

    given = {"entropy": options.exit_entropy, "every": options.exit_every, "min_steps": options.min_steps}
    given = {name: value for name, value in given.items() if value is not None}
    if options.exit is None:
        if given or options.exit_threshold:
            raise UserError("--exit_threshold, --exit_entropy, --exit_every and --min_steps need --exit NAME")
        return {}
    try:
        thresholds = [float(word) for word in options.exit_threshold.split(",")] if options.exit_threshold else [None]
    except ValueError:
        raise UserError(
            f"--exit_threshold {options.exit_threshold}: not a number, nor several between commas"
        ) from None
    rules = [Exit(options.exit, threshold, **given) for threshold in dict.fromkeys(thresholds)]
    rules = [dataclasses.replace(rule, threshold=rule.limit) for rule in rules]  # a default is part of what was scored
    return {rule.name if len(rules) == 1 else f"{rule.name} {rule.limit:g}": rule for rule in rules}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run("python -m jax_huginn.evaluate", __doc__ or "", given, add_options, open_model)


if __name__ == "__main__":
    sys.exit(main())
