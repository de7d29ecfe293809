"""One evaluation command for all frameworks: options, tasks, tables and a results file.

Every task is evaluated by itself, so one that cannot run is reported and costs no other. Exit status: 0 all tasks ran,
1 some did not, 2 nothing was started because of a mistake in the command, 130 interrupted.
"""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_tasks.cache import AnswerCache
from eval_tasks.errors import cluster_errors
from eval_tasks.identity import identify
from eval_tasks.language_model import LanguageModel
from eval_tasks.loading import FEWSHOT_SEED, first_line, load_task, load_task_manager, missing_package
from eval_tasks.options import Parser, add_options, check, samples_file
from jax_huginn.config.checks import UserError
from jax_huginn.files import whole_file

if TYPE_CHECKING:
    from eval_tasks.identity import Opened
    from eval_tasks.lm import HuginnLM

BOOTSTRAPS = 100  # resamples behind the standard errors that have no closed form


def run(
    program: str,
    description: str,
    arguments: Sequence[str],
    add_own_options: Callable[[argparse.ArgumentParser], None],
    open_model: "Callable[[argparse.Namespace], Opened]",
) -> int:
    """Evaluate as the command line says and return the exit status.

    Args:
        add_own_options: adds what names the model.
        open_model: loads what the options name; raises UserError when they cannot work.
    """
    parser = Parser(
        prog=program, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_own_options(parser)
    add_options(parser)
    try:
        options = parser.parse(list(arguments))
        check(options)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would fill log files; read by tqdm's import
        manager = load_task_manager(options)
        opened = open_model(options)
        tokens, rows = len(opened.tokenizer), opened.model.vocab_size
        if tokens > rows:
            raise UserError(f"the tokenizer has {tokens} tokens, more than the model's {rows}")
        if options.apply_chat_template and not opened.tokenizer.chat_template:
            raise UserError("--apply_chat_template: the tokenizer has no chat template")
        return _evaluate_all(program, opened, manager, options)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _evaluate_all(program: str, opened: "Opened", manager: Any, options: argparse.Namespace) -> int:
    from eval_tasks.lm import HuginnLM

    identity = identify(opened)
    samples = None
    if options.log_samples:
        samples = samples_file(options.output)
        samples.write_text("", encoding="utf-8")
    settings = _settings(opened, options.recurrence)
    report: dict[str, Any] = {
        "source": str(opened.source),
        **identity,
        "chat_template": opened.tokenizer.chat_template if options.apply_chat_template else None,
        "fewshot_seed": FEWSHOT_SEED,
        "finished": False,
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "use_cache")},
        "results": {setting.name: {} for setting in settings},
        "executed_steps": {setting.name: {} if setting.exit else setting.recurrence for setting in settings},
        "exits": {setting.name: setting.exit for setting in settings if setting.exit},
        "failed": {},
        "notes": {},
        "n_samples": {},
        "task_versions": {},
    }
    for setting in settings:
        key = {**identity, "recurrence": setting.recurrence, **setting.cache_key}
        with closing(AnswerCache(options.use_cache, key)) as cache:
            lm = HuginnLM(setting.model, opened.tokenizer, setting.recurrence, options.batch_size, cache)
            for name in options.tasks:
                title = name if len(settings) == 1 else f"{name} at {setting.title}"
                try:
                    found = _evaluate_task(name, title, setting, lm, manager, options, report)
                    if samples is not None:
                        _append(program, samples, setting.name, found)
                except UserError as error:
                    report["failed"][title] = str(error)
                    print(f"{program}: error: {title} did not run: {error}", file=sys.stderr)
                except Exception as error:  # a fault of ours or lm-eval's: shown in full, the other tasks run
                    report["failed"][title] = f"{type(error).__name__}: {first_line(error)}"
                    traceback.print_exc()
                for note, count in lm.notes.items():
                    print(f"{program}: warning: {title}: {count} {note}", file=sys.stderr)
                report["notes"][title] = dict(lm.notes)
                lm.notes.clear()
                report["finished"] = setting is settings[-1] and name == options.tasks[-1]
                if options.output is not None:  # after every task, so that a crash or a kill keeps what is done
                    _write(program, options.output, report)
    return 1 if report["failed"] else 0


@dataclass(frozen=True)
class Setting:
    """How deep the model thinks in one evaluation."""

    name: str
    """Its key in the results: the depth, or the criterion by which tokens exit."""
    model: LanguageModel
    recurrence: int
    """Recurrences of a token; with `exit` the most of them."""
    exit: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        return f"recurrence {self.recurrence}" if self.exit is None else f"exit {self.name}"

    @property
    def cache_key(self) -> dict[str, Any]:
        """What `recurrence` does not say."""
        return {"exit": self.exit} if self.exit else {}


def _settings(opened: "Opened", depths: Sequence[int]) -> list[Setting]:
    """Every depth, or every criterion at every depth; a depth is in a criterion's name where there are several."""
    if not opened.exits:
        return [Setting(str(depth), opened.model, depth) for depth in depths]
    return [
        Setting(
            each.name + (f" at most {depth}" if len(depths) > 1 else ""), each.model, depth,
            {**each.options, "most": depth},
        )
        for depth in depths
        for each in opened.exits
    ]  # fmt: skip


def _evaluate_task(
    name: str,
    title: str,
    setting: Setting,
    lm: "HuginnLM",
    manager: Any,
    options: argparse.Namespace,
    report: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Print lm-eval's table of one task or group and add its results to the report; raises UserError as above.

    Returns: of every task, lm-eval's record of each document where `--log_samples` asks for them.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import make_table

    os.environ["DISABLE_MULTIPROC"] = "1"  # so few resamples are not worth lm-eval's pool of processes
    loaded = load_task(name, manager, options)
    clusters = {task: (each.config.metadata or {}).get("cluster") for task, each in loaded["tasks"].items()}
    lm.steps = dict.fromkeys(lm.steps, 0.0)
    log_samples = options.log_samples or any(clusters.values())
    try:
        results: Any = evaluate(
            lm, loaded, limit=options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=log_samples,
            system_instruction=options.system_instruction, apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn, confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )  # fmt: skip
    except ImportError as error:
        raise UserError(missing_package(error)) from None
    for task, column in clusters.items():
        if column:
            cluster_errors(results["results"][task], column, results["samples"][task])
    if title != name:
        print(setting.title)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if lm.steps["tokens"]:
        steps = {kind: lm.steps[kind] / lm.steps["tokens"] for kind in ("used", "computed")}
        print(f"recurrences per token: {steps['used']:.3f} used, {steps['computed']:.3f} computed\n")
        report["executed_steps"][setting.name].update(dict.fromkeys(results["results"], steps))
    report["results"][setting.name].update(results["results"])
    report["n_samples"].update(results["n-samples"])
    report["task_versions"].update(results["versions"])
    return results["samples"] if options.log_samples else {}


def _append(program: str, file: Path, depth: str, samples: dict[str, list[dict[str, Any]]]) -> None:
    try:
        with file.open("a", encoding="utf-8") as out:
            for task, documents in samples.items():
                for each in documents:
                    line = {"task": task, "depth": depth, **_json(each)}
                    out.write(json.dumps(line, default=str, allow_nan=False) + "\n")
    except OSError as error:
        print(f"{program}: error: --log_samples {file} cannot be written: {error.strerror}", file=sys.stderr)


def _write(program: str, output: Path, report: dict[str, Any]) -> None:
    """The whole report so far; a disk that is full costs the file alone."""
    try:
        with whole_file(output) as unfinished:
            text = json.dumps(_json(report), indent=2, default=str, allow_nan=False)
            unfinished.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        print(f"{program}: error: --output {output} cannot be written: {error.strerror}", file=sys.stderr)


def _json(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
