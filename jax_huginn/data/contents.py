"""What a run's data contain, so that a resumed run reads the same: content decides, not where or how it is spelled.

RUN/data_files.json lists the files with relative path, range, size and a digest, and the tokenizer's digest. A
checkpoint holds digests of these lists in its order of the data; the file serves to name what differs.

A digest covers a small file whole, and of a larger one the size and some blocks, so that 10 000 files take under a
second. An edit that keeps the size and lies between the blocks is not noticed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_huginn.data.sources.files import CorpusFile, DataError, open_file
from jax_huginn.files import whole_file

LISTED = "data_files.json"
BLOCK_BYTES = 4096
BLOCKS = 4  # evenly spaced, the first and the last of them at the file's ends
NAMED = 3  # files that a refusal names, of each kind
THREADS = 4  # for file systems that answer slowly

Entry = tuple[str, int, int | None, int, str]
"""Relative path, first byte, byte before which reading stops or None, size, digest."""


@dataclass(frozen=True)
class Contents:
    """The files of a run and its tokenizer."""

    training: tuple[Entry, ...]
    held_out: tuple[Entry, ...]
    tokenizer: str
    """Digest of how it encodes; empty without one."""

    def order(self) -> dict[str, str]:
        """What a checkpoint's order of the data records of the files."""
        return {"files": _summary(self.training), "held_out": _summary(self.held_out)}

    def write(self, run_dir: Path) -> None:
        """Write the list into the run folder, unless it is there."""
        text = json.dumps({"training": self.training, "held_out": self.held_out, "tokenizer": self.tokenizer}, indent=0)
        file = run_dir / LISTED
        if file.exists() and file.read_text() == text:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as unfinished:
            unfinished.write_text(text)

    def check(self, order: dict[str, Any], run_dir: Path) -> None:
        """Compare with a checkpoint's order. Token rows may get a tokenizer later, but not another one.

        Raises:
            DataError: the contents differ; the files that do are named.
        """
        try:
            kept = json.loads((run_dir / LISTED).read_text())
            then = [[(*entry,) for entry in kept[name]] for name in ("training", "held_out")]
            tokenizer = order.get("tokenizer") or kept["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError):  # it was lost: the order has digests, but no names
            then, tokenizer = [], order.get("tokenizer")
        parts = []
        if tokenizer and self.tokenizer and tokenizer != self.tokenizer:
            parts.append(f"the tokenizer is not the run's, which is in {run_dir / 'tokenizer'}")
        changed = {name: now for name, now in self.order().items() if order.get(name) != now}
        if changed and then:
            parts += _differences(then[0], self.training, "") + _differences(then[1], self.held_out, "held-out ")
        elif changed:
            parts += [f"{name} was {order.get(name)}, now {now}" for name, now in changed.items()]
        if parts:
            raise DataError(
                f"the data are not those of the checkpoint: {'; '.join(parts)}: restore them, or start a new run with "
                "--checkpoint.init_from"
            )


def contents_of(training: Sequence[CorpusFile], held_out: Sequence[CorpusFile], tokenizer: str) -> Contents:
    """Look at all files; `DataError` for one that cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        lists = [tuple(pool.map(_entry, files, chunksize=64)) for files in (training, held_out)]
    return Contents(lists[0], lists[1], tokenizer)


def _entry(file: CorpusFile) -> Entry:
    size, digest = (file.size, file.digest) if file.size is not None else _sampled(file.path)
    return file.relative_path, file.begin, file.end, size, digest


def _sampled(path: Path) -> tuple[int, str]:
    """Size and digest of a file on this machine."""
    with open_file(path) as stream:
        handle = stream.fileno()
        size = os.fstat(handle).st_size
        if size <= BLOCKS * BLOCK_BYTES:
            content = os.pread(handle, size, 0)
        else:
            places = ((size - BLOCK_BYTES) * block // (BLOCKS - 1) for block in range(BLOCKS))
            content = str(size).encode() + b"".join(os.pread(handle, BLOCK_BYTES, place) for place in places)
        return size, hashlib.sha256(content).hexdigest()[:32]


def _summary(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} files, {hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]}"


def _differences(then: Sequence[tuple[Any, ...]], now: Sequence[Entry], kind: str) -> list[str]:
    """'changed a.txt, b.txt and 3 more; missing c.txt'."""
    old, new = {entry[0]: entry for entry in then}, {entry[0]: entry for entry in now}
    groups = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "missing": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
    }
    return [
        f"{verb} {kind}{', '.join(names[:NAMED])}" + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for verb, names in groups.items()
        if names
    ]
