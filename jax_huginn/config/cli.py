"""The command line of training: a preset file, then overrides of single fields, by tyro."""

import argparse
import dataclasses
import difflib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import Config


def load_preset(path: str) -> Config:
    """The `Config` that a preset file's `get_config()` returns."""
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(str(preset) for preset in Path("configs").glob("*.py")))
        raise ConfigError(f"no config file at {path}" + (f"; there are {known}" if known else ""))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config file {path} fails to load: {type(error).__name__}: {error}") from error
    get_config: Callable[[], Any] | None = getattr(module, "get_config", None)
    config = get_config() if callable(get_config) else None
    if not isinstance(config, Config):
        raise ConfigError(f"config file {path} must define get_config() returning a jax_huginn Config")
    return config


def parse_config(arguments: Sequence[str]) -> Config:
    """`--config FILE [--section.field value ...]` as a validated `Config`.

    Raises:
        ConfigError: an unknown option, with the nearest known one, or a value that cannot work.
        SystemExit: after `--help`.
    """
    import tyro

    path, overrides = _split_config_option(list(arguments))
    default = load_preset(path)
    overrides = [re.sub(r"^(--[^=]+=)?(?i:(true|false))$", _capitalized, word) for word in overrides]
    if {"-h", "--help"} & set(overrides):
        return tyro.cli(Config, args=overrides, default=default, config=(tyro.conf.FlagConversionOff,))
    errors = io.StringIO()
    try:
        # tyro draws a box around what is wrong; the mission is one line, so the box is read and retold.
        with redirect_stderr(errors):
            return tyro.cli(Config, args=overrides, default=default, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        raise ConfigError(_one_line(errors.getvalue(), overrides, default)) from None


def _split_config_option(arguments: list[str]) -> tuple[str, list[str]]:
    for index, word in enumerate(arguments):
        if word == "--config" and index + 1 < len(arguments):
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), arguments[:index] + arguments[index + 1 :]
    raise ConfigError("name a config file, for example --config configs/moe.py")


def _capitalized(match: re.Match[str]) -> str:
    return (match.group(1) or "") + match.group(2).capitalize()


def _one_line(box: str, overrides: list[str], default: Config) -> str:
    known = _option_names(default)
    for word in overrides:
        name = word.split("=")[0].replace("-", "_").replace("__", "--", 1) if word.startswith("--") else ""
        if name and name not in known:
            return _unknown_option(word.split("=")[0], name, known)
    text = re.sub(r"[╭╮╰╯│─\s]+", " ", box).strip()
    text = re.split(r" Argument helptext: | For full helptext", text)[0]
    return re.sub(
        r"^.*?Error parsing (?!--)\S+: |^(Value error Error|Invalid choice|Missing argument|Unrecognized options) ",
        "",
        text,
    )


def _unknown_option(typed: str, name: str, known: list[str]) -> str:
    """The line on an option as it was `typed`, whose normal form `name` is near to one of the `known`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown option {typed}" + (f"; did you mean {close[0]}?" if close else "")


def _option_names(section: Any, prefix: str = "--") -> list[str]:
    names = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            names += _option_names(value, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest option for a mistyped one; for the `python -m` verbs."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        for word in sys.argv[1:] if args is None else args:
            option = word.split("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(_unknown_option(option, option, list(self._option_string_actions)))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def run_verb(main: Callable[[], None]) -> None:
    """Run a command and turn a user's mistake into one line on stderr and exit status 2.

    Users' mistakes are subclasses of ValueError; a plain ValueError is a fault of the program and keeps its traceback.
    Ctrl-C where nothing is at stake, as before the first step, ends with status 130.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        if type(error) is ValueError:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
