"""What a user can do wrong with foreign weights. Each text is one line."""

from pathlib import Path

from jax_huginn.config.checks import UserError


class WeightsError(UserError):
    """Weights that are missing, broken or of a model that this one cannot be."""


class ExportError(UserError):
    """An export that cannot be made."""


def check_target(path: Path) -> None:
    """Raises ExportError unless `path` is free and its folder is there."""
    if path.exists():
        raise ExportError(f"{path} exists: remove it or name another --out")
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent} is not a folder: create it or name another --out")
