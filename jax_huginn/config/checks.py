"""How a user's mistake is reported: one line that names the value and what to do."""

import re
from typing import Any

LONGEST = 1000  # characters of a message
UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


class UserError(ValueError):
    """A mistake that a user can fix; commands print its text as one line and exit with status 2.

    The text is cut to printable characters, since names and values in it may come from a damaged file. Every other
    exception is a bug of the program and keeps its traceback.
    """

    def __init__(self, text: str):
        shown = "".join(character if character.isprintable() else "?" for character in text)
        super().__init__(shown if len(shown) <= LONGEST else shown[:LONGEST] + "...")


class ConfigError(UserError):
    """A configuration that cannot work; the line names the field, its value and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be positive")


def seconds_of(text: str) -> int | None:
    """Seconds in a duration as people write it: 300, 300s, 5m, 1h30m, 2d; None if it is not one."""
    match = _DURATION.fullmatch(text)
    if not match or not any(match.groups()) or not text.isascii():
        return None
    return sum(int(count or 0) * unit for count, unit in zip(match.groups(), UNITS.values(), strict=True))
