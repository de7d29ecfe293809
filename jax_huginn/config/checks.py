"""How a config refuses values that cannot work."""

from typing import Any

from jax_huginn.config.errors import OneLineError


class ConfigError(OneLineError):
    """A configuration that cannot work; its text is one line naming the field, the value and the mend."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be positive")
