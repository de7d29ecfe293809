"""Answers kept on disk, so that an evaluation that was killed resumes, and that never belong to another model.

A file holds the answers of one setting: of everything besides the request that changes an answer. Its name is the
setting's digest and its first line the setting. lm-eval's own cache keys an answer by its request alone, and so returns
the scores of another depth or model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jax_huginn.config.checks import UserError


class AnswerCache:
    """request -> answer, both of plain JSON types; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, setting: dict[str, Any]):
        self._answers: dict[str, Any] = {}
        self._file = None
        if folder is None:
            return
        path = folder / f"{_digest(setting)[:32]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                    self._answers[entry["request"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):  # cut by a kill or damaged: asked again
                    continue
            self._file = path.open("a", encoding="utf-8")
            # A line of its own, also after one that a kill cut short.
            self._file.write("\n" if lines else json.dumps(setting) + "\n")
        except OSError as error:
            raise UserError(f"--use_cache {folder} cannot be written: {error.strerror}") from None

    def get(self, request: Any) -> Any | None:
        return self._answers.get(_digest(request))

    def put(self, request: Any, answer: Any) -> None:
        if self._file is not None:
            self._answers[_digest(request)] = answer
            self._file.write(json.dumps({"request": _digest(request), "answer": answer}) + "\n")

    def flush(self) -> None:
        """Hand what was put to the operating system, which keeps it through a kill."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
