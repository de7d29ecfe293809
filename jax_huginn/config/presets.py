"""Config files: presets (`configs/*.py`) and the `config.json` of a run; and the preset that the package exports."""

import ast
import dataclasses
import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_huginn.config.checks import ConfigError, UserError, require
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RecurrenceConfig,
    TrainConfig,
)


def MoEHuginnConfig700M(**fields: Any) -> Config:
    """The preset `configs/moe_700m.py`: 0.71 B parameters, 8 routed and 1 shared expert.

    Args:
        fields: replace the preset's; a dict replaces some of a section's: `run_dir="runs/mine", train={"steps": 100}`.

    Raises:
        ConfigError: a field that there is not, or a value that cannot work.
    """
    preset = Config(
        run_dir="runs/moe_700m",
        model=ModelConfig(width=2048, heads=16, kv_heads=16, mlp_width=5632),
        compute=ComputeConfig(remat="dots", unroll=True),
        moe=MoEConfig(experts=8, active=2, width=2816),
        recurrence=RecurrenceConfig(mean=32, backprop_depth=8),
        train=TrainConfig(steps=47_684, batch_size=512, sequence_length=4096, micro_batches=128),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=4096),
        data=DataConfig(source="hub", path="tomg-group-umd/huginn-dataset", tokenizer="tomg-group-umd/huginn-0125"),
    )
    values = to_dict(preset)
    for name, value in fields.items():
        value = to_dict(value) if dataclasses.is_dataclass(value) else value
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    return from_dict(values)


def load_config(path: str) -> Config:
    """The config that a preset's `get_config()` returns, or that a run's `config.json` holds.

    Raises:
        ConfigError: there is no such file, or it gives no config.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inside = file / "config.json"
        fix = f"give --config {inside}" if inside.is_file() else "give a preset (a Python file) or a run's config.json"
        raise ConfigError(f"--config {path} is a folder: {fix}")
    if not file.is_file():
        known = ", ".join(str(preset) for preset in sorted(Path("configs").glob("*.py")))
        raise ConfigError(f"no config file at {path}" + (f"; there are {known}" if known else ""))
    if file.suffix == ".json":
        return _read_json(file)
    require(
        file.suffix == ".py",
        f"--config {path} is not a preset: give a Python file with get_config(), for example configs/moe.py, or a "
        "run's config.json",
    )
    return _run_preset(file)


def _read_json(file: Path) -> Config:
    try:
        return from_dict(json.loads(file.read_text()))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as a config ({error})") from None


def _run_preset(file: Path) -> Config:
    """Run a preset as Python runs a script: as a known module, with its own folder importable."""
    name = f"preset_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ConfigError(f"config file {file}{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    if not isinstance(config, Config):
        raise ConfigError(f"config file {file} must define get_config() returning a jax_huginn Config")
    return config


def describe_presets(folder: Path) -> list[str]:
    """A line for each preset in a folder: its path and the first sentence of its docstring."""
    lines = []
    for file in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        lines.append(f"{file}  {text.splitlines()[0] if text else ''}".rstrip())
    return lines
