"""A config as plain JSON types, and back with the type of every value checked."""

import dataclasses
from typing import Any, get_args, get_type_hints

from jax_huginn.config.checks import require
from jax_huginn.config.schema import Config

# Fields by the name they had before the section `compute` existed: old run folders and commands still use them.
RENAMED = {
    "model.attention": "compute.attention",
    "model.remat": "compute.remat",
    "model.unroll": "compute.unroll",
    "model.loss_chunk": "compute.loss_chunk",
    "train.deterministic": "compute.deterministic",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A config or a section as plain JSON types."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def from_dict(values: dict[str, Any], cls: type = Config, where: str = "") -> Any:
    """The inverse of `to_dict`. A missing field takes its default, one in `RENAMED` its new name.

    Raises:
        ConfigError: a field is unknown or has a value of another type; the line names it.
    """
    require(isinstance(values, dict), f"{where or 'config'} must be an object, not {type(values).__name__}")
    values = _with_new_names(values) if cls is Config else values
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        require(name in hints, f"unknown field {where}{name}={value!r}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(value, hint, f"{where}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            value = tuple(value) if isinstance(value, list) else value
            require(_is_of(value, hint), f"{where}{name}={value!r:.200} is not of the type {name_of_type(hint)}")
        arguments[name] = value
    return cls(**arguments)


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for old, new in RENAMED.items():
        (old_section, old_field), (new_section, new_field) = old.split("."), new.split(".")
        fields, target = values.get(old_section), values.setdefault(new_section, {})
        if isinstance(fields, dict) and old_field in fields and isinstance(target, dict) and new_field not in target:
            target[new_field] = fields.pop(old_field)
    return values


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value is valid for a field of this type; an int is valid for a float."""
    choices = get_args(hint)
    if not choices:
        return type(value) is hint or (hint is float and type(value) is int)
    if isinstance(choices[0], str):  # Literal
        return isinstance(value, str) and value in choices
    if choices[-1] is Ellipsis:  # tuple[int, ...]
        return type(value) is tuple and all(_is_of(each, choices[0]) for each in value)
    return any(_is_of(value, choice) for choice in choices)  # float | None


def name_of_type(hint: Any) -> str:
    """The type of a field as a message shows it: `int`, `float | None`, `one of 'ring', 'all_to_all'`."""
    choices = get_args(hint)
    if choices and isinstance(choices[0], str):
        return f"one of {', '.join(map(repr, choices))}"
    return hint.__name__ if isinstance(hint, type) and not choices else str(hint).replace("typing.", "")
