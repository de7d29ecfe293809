"""A config as plain JSON types, and back with every value's type checked."""

import dataclasses
from typing import Any, get_args, get_type_hints

from jax_huginn.config.checks import ConfigError, require
from jax_huginn.config.schema import Config


def to_dict(config: Any) -> dict[str, Any]:
    """A config or a section as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Config, where: str = "") -> Any:
    """The inverse of `to_dict`; an unknown or ill-typed field raises `ConfigError` naming it."""
    require(isinstance(values, dict), f"{where or 'config'} must be an object, not {type(values).__name__}")
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        require(name in hints, f"unknown field {where}{name}={value!r}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(value, hint, f"{where}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            value = tuple(value) if isinstance(value, list) else value
            require(_is_of(value, hint), f"{where}{name}={value!r:.200} is not of the type {_name_of(hint)}")
        arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where or 'config '}cannot be read: {error}") from None


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand in a field of this type; an int may in a float's place."""
    choices = get_args(hint)
    if not choices:
        return type(value) is hint or (hint is float and type(value) is int)
    if isinstance(choices[0], str):  # Literal
        return isinstance(value, str) and value in choices
    if choices[-1] is Ellipsis:  # tuple[int, ...]
        return type(value) is tuple and all(_is_of(each, choices[0]) for each in value)
    return any(_is_of(value, choice) for choice in choices)  # float | None


def _name_of(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
