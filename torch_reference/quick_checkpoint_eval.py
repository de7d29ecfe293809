"""Evaluates an exported checkpoint with lm-eval, in PyTorch.

    python torch_reference/quick_checkpoint_eval.py --checkpoint_name model.pth --tokenizer_path DIR \
        --tasks "arc_easy,hellaswag,tinyMMLU" --recurrence 8 --batch_size 16

Besides lm-eval's own tasks there are two that need no network: stdlib_continuation and stdlib_perplexity.
Every task is evaluated by itself: one that cannot run is reported and does not cost the others.
Exit status: 0 all tasks ran, 1 some did not, 2 nothing was started because of a mistake in the command.
"""

import argparse
import difflib
import json
import logging
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlparse

if __package__ in (None, ""):  # run as a file: make the clone's root importable in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval_tasks import TASKS, TASKS_FOLDER

if TYPE_CHECKING:
    from torch_reference.harness import HuginnLM

PROBE_SECONDS = 3.0
FEWSHOT_SEED = 1234  # of lm-eval's own command
BOOTSTRAPS = 100  # resamples behind the standard errors that have no closed form
TINY_BENCHMARKS = "pip install git+https://github.com/felipemaiapolo/tinyBenchmarks"


class UserError(Exception):
    """A mistake in the command or its files; one line."""


class Parser(argparse.ArgumentParser):
    """Answers in one line, and takes dashes for underscores in option names."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        normal = []
        for argument in arguments:
            name, equals, value = argument.partition("=")
            normal.append(
                name.replace("-", "_").replace("__", "--", 1) + equals + value if name[:2] == "--" else argument
            )
        options, unknown = self.parse_known_args(normal)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown option {unknown[0]}{_suggestion(unknown[0].partition('=')[0], known)}")
        return options


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for what can be seen to be wrong before anything is loaded."""
    parser = Parser(
        prog="quick_checkpoint_eval", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--checkpoint_name", required=True, metavar="FILE", help="the exported .pth file")
    parser.add_argument(
        "--tokenizer_path", required=True, metavar="DIR", help="folder or hub name that AutoTokenizer loads"
    )
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="lm-eval tasks, separated by commas")
    parser.add_argument("--recurrence", type=int, default=32, metavar="R", help="recurrences per token (32)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="sequences at once (16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of every task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before every question (the task's own)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results there, as JSON")
    options = parser.parse(arguments)

    for name, least in (("recurrence", 1), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    options.tasks = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not options.tasks:
        raise UserError("--tasks names no task")
    if not Path(options.checkpoint_name).is_file():
        raise UserError(f"--checkpoint_name {options.checkpoint_name}: no such file")
    if not Path(options.tokenizer_path).is_dir() and options.tokenizer_path.count("/") > 1:  # no name of the hub
        raise UserError(f"--tokenizer_path {options.tokenizer_path}: no such folder")
    if options.output is not None and options.output.exists():
        raise UserError(f"--output {options.output} exists already, and is not overwritten")
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would fill log files
        # The own tasks are all there is to know when only they are asked for: lm-eval's index of its 14 000 takes 8 s.
        foreign = [name for name in options.tasks if name not in TASKS]
        if foreign or not Path(options.tokenizer_path).is_dir():
            go_offline_without_network()
        manager = load_task_manager(options.tasks, include_defaults=bool(foreign))
        lm = load_lm(options)
    except UserError as error:
        print(f"quick_checkpoint_eval: error: {error}", file=sys.stderr)
        return 2

    report: dict[str, Any] = {"device": str(lm.device), "results": {}, "failed": {}, "n_samples": {}, "versions": {}}
    for name in ("checkpoint_name", "recurrence", "limit", "num_fewshot"):
        report[name] = getattr(options, name)
    for name in options.tasks:
        try:
            evaluate_task(name, lm, manager, options, report)
        except UserError as error:
            report["failed"][name] = str(error)
            print(f"quick_checkpoint_eval: error: {name} did not run: {error}", file=sys.stderr)
        except Exception as error:  # a fault of ours or lm-eval's: shown in full, the other tasks run
            report["failed"][name] = f"{type(error).__name__}: {_first_line(error)}"
            traceback.print_exc()
        if options.output is not None:  # after every task, so that a crash or a kill keeps what is done
            write_whole(options.output, json.dumps(report, indent=2, default=str) + "\n")
    return 1 if report["failed"] else 0


def go_offline_without_network() -> None:
    """Sets the Hub's offline mode when its host cannot be reached, before the libraries read it.

    Measured without a network: datasets retries for 23 s a task, and in offline mode answers at once, from its cache
    if the data is there. Behind a proxy the probe would prove nothing, so there the libraries find out themselves.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE")):
        return
    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    reached = threading.Event()

    def probe() -> None:  # in a thread, since a name server that does not answer blocks for longer than any timeout
        try:
            socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), 2).close()
            reached.set()
        except OSError:
            pass
        done.set()

    done = threading.Event()
    threading.Thread(target=probe, daemon=True).start()
    done.wait(PROBE_SECONDS)
    if not reached.is_set():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def load_task_manager(tasks: list[str], include_defaults: bool) -> Any:
    """lm-eval's index; raises UserError for a task that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}): pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=include_defaults)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"unknown task {name}{_suggestion(name, manager.all_tasks)}")
    return manager


def load_lm(options: argparse.Namespace) -> "HuginnLM":
    """The checkpoint and its tokenizer as lm-eval's model; raises UserError when they cannot work."""
    import torch
    from transformers import AutoTokenizer

    from torch_reference.checkpoint import CheckpointError, load_checkpoint
    from torch_reference.harness import HuginnLM

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_path)
    except Exception as error:  # whatever a broken folder made its parts raise
        raise UserError(f"--tokenizer_path {options.tokenizer_path}: no tokenizer ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_path {options.tokenizer_path}: the tokenizer defines no EOS token")
    try:
        model = load_checkpoint(options.checkpoint_name)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    if len(tokenizer) > model.config.padded_vocab_size:
        raise UserError(
            f"--tokenizer_path {options.tokenizer_path} has {len(tokenizer)} tokens, "
            f"more than the model's {model.config.padded_vocab_size}"
        )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    return HuginnLM(model.to(device), tokenizer, options.recurrence, options.batch_size)


def load_task(name: str, manager: Any, num_fewshot: int | None) -> Any:
    """The task, or the tasks of a group, as lm-eval's `evaluate` takes them; raises UserError if it cannot run here."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = manager.load([name])
    except ImportError as error:
        if "tinyBenchmarks" in str(error):
            raise UserError(f"it needs the package tinyBenchmarks: {TINY_BENCHMARKS}") from None
        raise UserError(f"it needs a package that is not installed: {_first_line(error)}") from None
    except (OSError, ValueError) as error:  # no network, a refusing server, a half-filled cache
        raise UserError(f"its dataset cannot be loaded: {_first_line(error)}") from None
    for task in loaded["tasks"].values():  # as lm-eval's own command: a task that insists on no examples gets none
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def evaluate_task(name: str, lm: "HuginnLM", manager: Any, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Prints lm-eval's table of one task or group and adds its results to the report; raises UserError as above."""
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import make_table

    from torch_reference.harness import UnsupportedRequestError

    os.environ["DISABLE_MULTIPROC"] = "1"  # so few resamples are not worth lm-eval's pool of processes
    loaded = load_task(name, manager, options.num_fewshot)
    try:
        results: Any = evaluate(lm, loaded, limit=options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    except UnsupportedRequestError as error:
        raise UserError(str(error)) from None
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    report["results"].update(results["results"])
    report["n_samples"].update(results["n-samples"])
    report["versions"].update(results["versions"])


def write_whole(path: Path, text: str) -> None:
    """The file holds all of the text or stays as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; perhaps you meant {' or '.join(close)}" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
