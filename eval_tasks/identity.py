"""What a score belongs to: the model, the tokenizer and the code that gave it."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_tasks.language_model import LanguageModel
from jax_huginn.files import sha256_of


@dataclass(frozen=True)
class Exiting:
    """A model whose tokens exit by a criterion, at the latest at the depth that is set."""

    name: str
    model: LanguageModel
    options: dict[str, Any]
    """Everything about the criterion that changes a score, as plain JSON types."""


@dataclass(frozen=True)
class Opened:
    """A model that is loaded, ready to be evaluated."""

    model: LanguageModel
    tokenizer: Any
    source: Path
    """The file or folder of the weights."""
    files: Sequence[Path]
    """The files by which its weights are known."""
    exits: Sequence[Exiting] = ()
    """The same model with exits, evaluated in place of `model` at fixed depths."""
    policy: str = "full"
    """Of the cache that generation reads."""
    budget: int = 0
    """Of a policy that has one."""


def identify(opened: Opened) -> dict[str, Any]:
    """Everything besides depth and request that changes a score, as plain JSON types."""
    model = opened.model
    return {
        "weights_sha256": sha256_of(opened.files),
        "tokenizer_sha256": _digest_of_tokenizer(opened.tokenizer),
        "dtype": model.dtype,
        "cache": {"policy": opened.policy, "budget": opened.budget},
        "device": model.device,
        "commit": _commit(),
        "versions": {
            "framework": model.version,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("lm-eval", "transformers")},
        },
    }


def _digest_of_tokenizer(tokenizer: Any) -> str:
    """Of what it makes of a text. Special tokens are added by the harness, whatever the tokenizer's own rule is."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(fast.to_str()) | {"post_processor": None} if fast is not None else tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _commit() -> str:
    """The commit of the clone that runs, with a digest of what was changed since; else the installed version."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True).stdout.strip()

    try:
        changes = git("diff", "HEAD")
        return git("rev-parse", "HEAD").decode() + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        try:
            return importlib.metadata.version("jax-huginn")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"
