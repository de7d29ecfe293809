"""The run folder: which job may write into it, which config it belongs to, and what in it is the run's own."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from jax_huginn.checkpoints.import_run import TOKENIZER_FILES
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.compatibility import changes
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import Config
from jax_huginn.files import whole_file

# What a run writes: files, and folders with a pattern of what it puts into them.
OWN_FILES = ("metrics.jsonl", "config.json", "wandb_id", "hub_files.json", "data_files.json")
OWN_FOLDERS = {
    "checkpoints": r"\d+(\.damaged(-\d+)?)?|\.unfinished",
    "tensorboard": r"events\..*",
    "tokenizer": "|".join(map(re.escape, TOKENIZER_FILES)),
    "profile": "plugins",
    "compiled": r".*-(cache|atime)|xla_.*",
}


class RunLock:
    """Keeps a second job out of a run folder while the first is in it.

    The system releases it whenever the process ends; on a file system without locks a kill may leave the file behind.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / ".lock"
        self._lock = FileLock(self.file)

    def acquire(self) -> None:
        """Create the folder if it is missing, and lock it.

        Raises:
            ConfigError: another job has it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"run_dir={self.folder} is in use by another job: wait for it to end, or name another --run_dir (if "
                f"none runs, delete {self.file})"
            ) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


def open_run_folder(config: Config, say: Callable[[str], None] = print) -> Path:
    """Create the run folder or check that it is this run's, and write config.json into it. `RunLock` holds it.

    Raises:
        ConfigError: the folder holds another config's run, or `checkpoint.resume=false` would lose checkpoints.
    """
    folder = Path(config.run_dir)
    file = folder / "config.json"
    _require_own(folder)
    begun = any(folder.glob("checkpoints/[0-9]*"))
    if begun and not config.checkpoint.resume:
        if not config.checkpoint.overwrite:
            raise ConfigError(
                f"run_dir={folder} holds checkpoints and checkpoint.resume is false: name another --run_dir, or "
                "--checkpoint.overwrite true to delete them"
            )
        say(f"checkpoint.overwrite: deleted {_clear(folder)} in {folder}")
    elif (folder / "checkpoints/0").is_dir():
        raise ConfigError(
            f"run_dir={folder} holds imported weights and no optimiser state to resume from: start another --run_dir "
            f"from them with --checkpoint.init_from {folder}"
        )
    elif file.exists() and (changed := changes(_read(file), config, begun)):
        text = "; ".join(map(str, changed))
        acceptable = all(change.may_be_accepted for change in changed)
        if not begun:
            say(f"{folder} saved no checkpoint under another config ({text}): deleted {_clear(folder)}")
        elif acceptable and config.checkpoint.accept_changes:
            say(f"checkpoint.accept_changes: {text}")
        else:
            fix = "resume with --checkpoint.accept_changes true, or " if acceptable else ""
            raise ConfigError(f"run_dir={folder} belongs to another config ({text}): {fix}name another --run_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as unfinished:
            unfinished.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir={folder} cannot be written: {error.strerror}")


def _read(file: Path) -> Config:
    """The config of the folder's run; a field added since has its default."""
    try:
        return from_dict(json.loads(file.read_text()))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}: name another --run_dir") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}): restore it, or name another --run_dir") from None


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds, under a name of ours, what no run wrote: it would be mixed up, or deleted later.

    Raises:
        ConfigError: the first such file.
    """
    for name, pattern in OWN_FOLDERS.items():
        for entry in sorted((folder / name).iterdir()) if (folder / name).is_dir() else []:
            if not re.fullmatch(pattern, entry.name):
                raise _foreign(folder, f"{name}/{entry.name}")
    if not (folder / "config.json").exists():
        for name in OWN_FILES:
            if (folder / name).exists():
                raise _foreign(folder, name)
        for name in OWN_FOLDERS:
            for entry in (folder / name).glob("[!.]*"):
                raise _foreign(folder, f"{name}/{entry.name}")


def _foreign(folder: Path, name: str) -> ConfigError:
    return ConfigError(f"run_dir={folder} holds {name}, which no run wrote there: move it, or name another --run_dir")


def _clear(folder: Path) -> str:
    """Delete what the run wrote, which `_require_own` has checked, and nothing else; the names of what was there."""
    found = [name for name in (*OWN_FOLDERS, *OWN_FILES) if (folder / name).exists()]
    for name in found:
        if name in OWN_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
    return ", ".join(found)
