"""Finding and loading lm-eval's tasks and a tokenizer, with one line for whatever cannot be loaded."""

import argparse
import fnmatch
import logging
import os
import socket
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from eval_tasks import TASKS, TASKS_FOLDER
from eval_tasks.options import suggestion
from eval_tasks.progress import reading
from jax_huginn.config.checks import UserError

PROBE_SECONDS = 3.0
FEWSHOT_SEED = 1234  # of lm-eval's own command
TINY_BENCHMARKS = "pip install git+https://github.com/felipemaiapolo/tinyBenchmarks"


def load_task_manager(options: argparse.Namespace) -> Any:
    """lm-eval's index of tasks. Patterns among `options.tasks` become the names that they match.

    Raises:
        UserError: lm-eval is missing, or it knows no such task.
    """
    # When only our own tasks are asked for, they are all there is to know: the index of lm-eval's 14 000 takes 8 s.
    own = [name for pattern in options.tasks for name in fnmatch.filter(TASKS, pattern)]
    foreign = any(not fnmatch.filter(TASKS, pattern) for pattern in options.tasks)
    if foreign:
        go_offline_without_network()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}): pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders: list[str | Path] = [folder for folder in (TASKS_FOLDER, options.include_path) if folder is not None]
    with reading("lm-eval's index of tasks") if foreign else nullcontext():
        manager = TaskManager(include_path=folders, include_defaults=foreign)
    names = dict.fromkeys(own if not foreign and options.include_path is None else [])
    if not names:
        for pattern in options.tasks:
            matches = fnmatch.filter(manager.all_tasks, pattern)
            if not matches:
                raise UserError(f"unknown task {pattern}{suggestion(pattern, manager.all_tasks)}")
            names |= dict.fromkeys(matches)
    options.tasks = list(names)
    return manager


def load_task(name: str, manager: Any, options: argparse.Namespace) -> Any:
    """The task, or the tasks of a group, as lm-eval's `evaluate` takes them.

    Raises:
        UserError: it cannot run here.
    """
    import datasets

    datasets.disable_progress_bars()
    if options.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise UserError(missing_package(error)) from None
    except Exception as error:
        if name in TASKS:  # a fault of ours
            raise
        if "HF_ALLOW_CODE_EVAL" in str(error):
            raise UserError(UNSAFE) from None
        if isinstance(error, OSError | ValueError):  # no network, a refusing server, a half-filled cache
            raise UserError(f"its dataset cannot be loaded: {first_line(error)}") from None
        raise UserError(f"it cannot be loaded: {type(error).__name__}: {first_line(error)}") from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
            raise UserError(UNSAFE)
        if getattr(task, "MULTIMODAL", False):
            raise UserError("it shows pictures or sounds, and this model reads text alone")
        own = task.get_config("num_fewshot")  # as lm-eval's own command: a task that insists on no examples gets none
        if own is None or (options.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
        if options.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=options.gen_kwargs, update=True)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


UNSAFE = "it runs code that the model writes: --confirm_run_unsafe_code gives the permission"


def load_tokenizer(source: str, option: str) -> Any:
    """The tokenizer in a folder or of a hub name; `option` begins every complaint."""
    from transformers import AutoTokenizer

    if not Path(source).is_dir():
        if source.count("/") > 1 or source.startswith((".", "~", "/")):  # no name of the hub
            raise UserError(f"{option} {source}: no such folder")
        go_offline_without_network()
    try:
        # A tokenizer needs no code from beside it, and without this the user is asked whether the model's may run.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder made its parts raise
        raise UserError(f"{option} {source}: no tokenizer ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{option} {source}: the tokenizer defines no EOS token")
    return tokenizer


def encode(tokenizer: Any, text: str, name: str = "a text") -> list[int]:
    """Tokens of the text alone, without BOS and EOS; `name` begins the complaint.

    Raises:
        UserError: a character that the tokenizer has no token for, such as a letter for that of a generated task.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the tokenizers package raises nothing more specific
        for character in text:
            try:
                tokenizer.encode(character, add_special_tokens=False)
            except Exception:
                raise UserError(f"{name} has {character!r}, which the tokenizer has no token for") from None
        raise UserError(f"{name} cannot be tokenized: {first_line(error)}") from None


def go_offline_without_network() -> None:
    """Set the Hub's offline mode when its host cannot be reached, before the libraries read it.

    Measured without a network: datasets retries for 23 s a task, and in offline mode answers at once, from its cache
    if the data is there. Behind a proxy the probe would prove nothing, so there the libraries find out themselves.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE")):
        return
    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    reached, done = threading.Event(), threading.Event()

    def probe() -> None:  # in a thread, since a name server that does not answer blocks for longer than any timeout
        try:
            socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), 2).close()
            reached.set()
        except OSError:
            pass
        done.set()

    threading.Thread(target=probe, daemon=True).start()
    done.wait(PROBE_SECONDS)
    if not reached.is_set():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def missing_package(error: ImportError) -> str:
    if "tinyBenchmarks" in str(error):
        return f"it needs the package tinyBenchmarks: {TINY_BENCHMARKS}"
    return f"it needs a package that is not installed: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
