"""The run folder: who may write into it, and the config that it belongs to."""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.compatibility import changes
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import Config


class RunLock:
    """Keeps a second job out of a run folder while the first is in it. The system lifts it when a process ends, however
    it does; a file system without locks (`filelock.SoftFileLock` then) may leave the file behind after a kill."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / ".lock"
        self._lock = FileLock(self.file)

    def acquire(self) -> None:
        """Make the folder if need be, and take it.

        Raises:
            ConfigError: another job has it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"run_dir={self.folder} is in use by another job: wait for its end, or name another --run_dir (if no "
                f"other runs, delete {self.file})"
            ) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


def open_run_folder(config: Config) -> Path:
    """Create the run folder or check that it is this run's, and write config.json into it. `RunLock` holds it.

    Raises:
        ConfigError: the folder holds another config's run, or `checkpoint.resume=false` would lose checkpoints.
    """
    folder = Path(config.run_dir)
    file = folder / "config.json"
    begun = any(folder.glob("checkpoints/[0-9]*"))
    if begun and not config.checkpoint.resume:
        if not config.checkpoint.overwrite:
            raise ConfigError(
                f"run_dir={folder} holds checkpoints and checkpoint.resume is false: name another --run_dir, or "
                "--checkpoint.overwrite true to delete them"
            )
        _clear(folder)
    elif (folder / "checkpoints/0").is_dir():
        raise ConfigError(
            f"run_dir={folder} holds imported weights and no optimiser state to go on from: start another --run_dir "
            f"from them with --checkpoint.init_from {folder}"
        )
    elif file.exists() and (changed := changes(_read(file), config)):
        if begun:
            raise ConfigError(
                f"run_dir={folder} belongs to another config ({'; '.join(changed)}): name another --run_dir"
            )
        _clear(folder)  # nothing was trained under the old config: its start failed, or it was stopped at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replacement = file.with_suffix(".tmp")
        replacement.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        replacement.replace(file)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir={folder} cannot be written: {error.strerror}")


def _read(file: Path) -> Config:
    """The config of the folder's run; a field that is younger than the run has its default."""
    try:
        return from_dict(json.loads(file.read_text()))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}: name another --run_dir") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}): restore it, or name another --run_dir") from None


def _clear(folder: Path) -> None:
    """Delete what a run writes, and nothing else that may be there."""
    for name in ("checkpoints", "tensorboard", "tokenizer", "profile", "compiled"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "config.json", "wandb_id", "hub_files.json"):
        (folder / name).unlink(missing_ok=True)
