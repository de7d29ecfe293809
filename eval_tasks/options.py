"""Options that every evaluation command takes, and their checks before anything is loaded."""

import argparse
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from jax_huginn.config.checks import UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, and takes dashes for underscores in option names."""

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
            raise UserError(f"unknown option {unknown[0]}{suggestion(unknown[0].partition('=')[0], known)}")
        return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to evaluate and how."""
    add = parser.add_argument
    add("--tasks", required=True, metavar="NAMES", help="lm-eval tasks, separated by commas; * and ? match any name")
    add("--recurrence", default="32", metavar="R[,R...]", help="recurrences per token (32), or several to compare")
    add("--batch_size", type=int, default=16, metavar="N", help="sequences at once (16)")
    add("--limit", type=int, metavar="N", help="only the first N documents of every task")
    add("--num_fewshot", type=int, metavar="N", help="examples before every question (the task's own number)")
    add("--dtype", choices=("bfloat16", "float32", "float64"), help="type to compute in; the model's own if not given")
    add("--output", type=Path, metavar="FILE", help="also write the results to FILE, as JSON")
    add("--log_samples", action="store_true", help="with --output: also write every question and answer, beside FILE")
    add("--use_cache", type=Path, metavar="DIR", help="keep answers in DIR, so that a killed evaluation resumes")
    add("--include_path", type=Path, metavar="DIR", help="folder of more task files")
    add("--gen_kwargs", metavar="JSON", help="generation settings that replace the tasks' own, a JSON object")
    add("--system_instruction", metavar="TEXT", help="text that precedes every prompt")
    add("--apply_chat_template", action="store_true", help="format prompts by the tokenizer's chat template")
    add("--fewshot_as_multiturn", action="store_true", help="with a chat template: every example is a turn of its own")
    add("--confirm_run_unsafe_code", action="store_true", help="allow tasks that run code written by the model")


def check(options: argparse.Namespace) -> None:
    """Parse lists in place; raises UserError for what can be seen to be wrong before anything is loaded."""
    try:
        options.recurrence = list(dict.fromkeys(int(word) for word in options.recurrence.split(",")))
    except ValueError:
        raise UserError(f"--recurrence {options.recurrence}: not a whole number, nor several between commas") from None
    for name, least in (("recurrence", 1), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < least:
                raise UserError(f"--{name} {each} must be at least {least}")
    options.tasks = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not options.tasks:
        raise UserError("--tasks names no task")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UserError(f"--include_path {options.include_path}: no such folder")
    if options.fewshot_as_multiturn and not options.apply_chat_template:
        raise UserError("--fewshot_as_multiturn needs --apply_chat_template")
    options.gen_kwargs = _json_object("--gen_kwargs", options.gen_kwargs)
    if options.log_samples and options.output is None:
        raise UserError("--log_samples needs --output FILE, beside which they are written")
    if options.output is not None:
        unfinished = _is_unfinished(options.output)
        for file in (options.output, *([samples_file(options.output)] if options.log_samples else [])):
            _require_writable(file, unfinished)


def _json_object(option: str, text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f'{option} {text}: not a JSON object such as {{"max_gen_toks": 64}}')
    return values


def samples_file(output: Path) -> Path:
    """Where `--log_samples` writes: an object for every document, task and depth, one a line."""
    return output.with_name(output.name.removesuffix(".json") + ".samples.jsonl")


def _is_unfinished(output: Path) -> bool:
    """Whether the file is what an evaluation left that was killed, so that the same command may replace it."""
    try:
        return json.loads(output.read_text(encoding="utf-8")).get("finished") is False
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _require_writable(output: Path, replaceable: bool) -> None:
    """A file of that name can be made: found out now, not after the hours of an evaluation."""
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    try:
        output.open("x").close()
        output.unlink()
    except FileExistsError:
        if replaceable:
            return
        raise UserError(f"--output {output} exists already, and is not overwritten") from None
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; perhaps you meant {' or '.join(close)}" if close else ""
