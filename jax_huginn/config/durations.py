"""Lengths of time as people write them: 300, 300s, 5m, 1h30m, 2d."""

import re

UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


def seconds_of(text: str) -> int | None:
    """The seconds that a text means; None where it means none."""
    match = _FORM.fullmatch(text)
    if not match or not any(match.groups()) or not text.isascii():
        return None
    return sum(int(count or 0) * unit for count, unit in zip(match.groups(), UNITS.values(), strict=True))
