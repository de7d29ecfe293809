"""Command lines: a config file with overrides, the parser of the `python -m` verbs, and how a command ends."""

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jax_huginn.config.checks import ConfigError, UserError
from jax_huginn.config.overrides import override, unknown_option
from jax_huginn.config.presets import describe_presets, load_config
from jax_huginn.config.schema import Config

HELP = {"-h", "--help"}


def parse_config(arguments: Sequence[str]) -> Config:
    """`--config FILE [--section.field value ...]` as a validated `Config`.

    Raises:
        ConfigError: an unknown option, with the nearest known one, or a value that cannot work.
        SystemExit: after `--help`, which prints every field with its default in FILE; without FILE, the presets.
    """
    path, overrides = _split_config_option(list(arguments))
    if path is not None and _split_config_option(overrides)[0] is not None:
        raise ConfigError("--config is given twice")
    asks_help = bool(HELP & set(overrides))
    if path is None:
        if asks_help:
            _print_presets()
            sys.exit(0)
        raise ConfigError("name a config file, for example --config configs/moe.py")
    config = load_config(path)
    if asks_help:
        import tyro

        tyro.cli(Config, args=["--help"], default=config, config=(tyro.conf.FlagConversionOff,))
    return override(config, overrides)


def _split_config_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    for index, word in enumerate(arguments):
        if word == "--config" and index + 1 < len(arguments):
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _print_presets() -> None:
    print(
        "usage: --config FILE [--section.field value ...]\n\nFILE is a preset or the config.json of a run. Presets:\n"
    )
    print("\n".join(f"  {line}" for line in describe_presets(Path("configs"))))
    print("\nAll fields and their values in a preset: --config FILE --help")


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option for a mistyped one; for the `python -m` verbs."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        for word in sys.argv[1:] if args is None else args:
            option = word.split("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(unknown_option(option, option, list(self._option_string_actions)))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, with dashes in their names, and those for fields of the config, which have a dot."""
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for word in arguments:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            target = overrides if "." in name else own
            name = name.replace("_", "-") if target is own else "--" + name[2:].replace("-", "_")
            word = "=".join([name, *value])
        target.append(word)
    return own, overrides


def run_verb(main: Callable[[], None]) -> None:
    """Run a command. A user's mistake becomes one line on stderr and exit status 2; a bug keeps its traceback.

    Ctrl-C where nothing has to be saved, as before the first step, exits with status 130. If the reader of a pipe has
    closed it, as `| head` does, the command ends silently with 141, the status of a process that SIGPIPE killed.
    """
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads; if so, what Python still wants to write at its exit is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
