"""Overrides of single fields, `--section.field value` on a command line, applied to a config."""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from jax_huginn.config.checks import ConfigError, require
from jax_huginn.config.dicts import RENAMED, from_dict, name_of_type, to_dict
from jax_huginn.config.schema import Config


def override(config: Config, words: Sequence[str]) -> Config:
    """The config with `--section.field value` or `--section.field=value` words applied and validated.

    Dashes and underscores are equal in names; booleans are true and false in any case; a tuple takes several values;
    `~/` is the home folder.

    Raises:
        ConfigError: an unknown option, with the nearest known one, or a value that cannot work.
    """
    fields = _fields(Config)
    values = to_dict(config)
    for typed, texts in _options(words):
        name = typed[2:].replace("-", "_")
        name = RENAMED.get(name, name)
        if name not in fields:
            raise ConfigError(unknown_option(typed, "--" + name, ["--" + known for known in fields]))
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = _parsed(typed, texts, fields[name])
    return from_dict(values)


def unknown_option(typed: str, name: str, known: list[str]) -> str:
    """The message for an option as it was `typed`, with the known option nearest to its normal form `name`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown option {typed}" + (f"; did you mean {close[0]}?" if close else "")


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every option with the values after it."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append((name, [value] if equals else []))
        else:
            require(bool(options), f"unexpected argument {word}: write --section.field {word}")
            options[-1][1].append(word)
    return iter(options)


def _fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every field by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        found |= _fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}  # pyright: ignore[reportArgumentType]
    return found


def _parsed(option: str, texts: list[str], hint: Any) -> Any:
    """The value that one or, for a tuple, several words give to a field of this type."""
    choices = get_args(hint)
    if choices and choices[-1] is Ellipsis:
        require(bool(texts), f"{option} needs at least one value")
        return tuple(_scalar(option, text, choices[0]) for text in texts)
    require(bool(texts), f"{option} needs a value")
    require(len(texts) == 1, f"{option} takes one value, not {' '.join(texts)}")
    if NoneType in choices:
        return None if texts[0].lower() == "none" else _scalar(option, texts[0], choices[0])
    return _scalar(option, texts[0], hint)


def _scalar(option: str, text: str, hint: Any) -> Any:
    choices = get_args(hint)
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if choices:
            return choices[choices.index(text)]
        return os.path.expanduser(text) if hint is str else hint(text)
    except (KeyError, ValueError):
        kind = "true or false" if hint is bool else name_of_type(hint)
        raise ConfigError(f"{option} {text!r} must be {kind}") from None
