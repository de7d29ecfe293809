"""Source `hub`: the parquet files of a Hugging Face dataset, fetched while training runs.

The repository is listed once, at a commit, and the listing is kept in RUN/hub_files.json, so the order of the data
cannot change during a run. A copy beside the cached files serves later runs without a network.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jax_huginn.config.schema import DataConfig
from jax_huginn.data.sources.cache import FileCache
from jax_huginn.data.sources.download import FetchError, Patience, UnreachableError, fetch
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.split import split_files

if TYPE_CHECKING:
    from jax_huginn.data.reader import Pieces

LISTING = "hub_files.json"
LISTING_ATTEMPTS = 5  # about 15 seconds; then an older listing is used, if there is one
NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"  # owner or repository; no "..", no hidden folder
DIGEST = r"[0-9a-f]{64}|[0-9a-f]{40}"
SPLITS = {"train": ("train", "training"), "held out": ("validation", "valid", "val")}  # first word of a folder or file


class Rows(Protocol):
    """`parquet_pieces` with its settings."""

    def __call__(self, file: CorpusFile, offset: int, *, path: Path) -> Iterator[tuple[int, np.ndarray]]: ...


@dataclass(frozen=True)
class Listing:
    """The parquet files of a repository at a commit, as (path, bytes, digest), sorted."""

    repository: str
    revision: str
    commit: str
    files: tuple[tuple[str, int, str], ...]

    def __post_init__(self) -> None:
        """Check what the hub or a kept file says: paths must stay below the repository, digests be digests."""
        wrong = [value for value in (self.repository, self.revision, self.commit) if not isinstance(value, str)]
        if wrong or not re.fullmatch(f"{NAME}/{NAME}", self.repository) or not re.fullmatch(DIGEST, self.commit):
            raise DataError(f"a listing of {self.repository!r} at {self.commit!r} names no repository and commit")
        for path, size, digest in self.files:
            if not isinstance(path, str) or not _stays_below(path):
                raise DataError(f"the listing of {self.repository} has the path {path!r}, which leads outside")
            if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch(DIGEST, digest):
                raise DataError(f"the listing of {self.repository} gives {path!r} size {size!r} and digest {digest!r}")

    def text(self) -> str:
        """As JSON."""
        whole = {"repository": self.repository, "revision": self.revision, "commit": self.commit, "files": self.files}
        return json.dumps(whole, indent=0) + "\n"


def _stays_below(path: str) -> bool:
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00-\x1f\x7f]", path)


def read_listing(file: Path) -> Listing:
    """Read a kept listing; a damaged one raises `DataError`."""
    try:
        saved = json.loads(file.read_text())
        files = tuple((path, size, digest) for path, size, digest in saved["files"])
        return Listing(saved["repository"], saved["revision"], saved["commit"], files)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}): restore it, or name another --run_dir"
        ) from None


def fetch_listing(repository: str, revision: str, patience: Patience) -> Listing:
    """List the repository on the hub at `revision`, resolved to a commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()

    def ask() -> Listing:
        commit = api.dataset_info(repository, revision=revision, timeout=30).sha or ""
        tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        files = [
            (entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile) and entry.path.endswith(".parquet")
        ]
        try:
            return Listing(repository, revision, commit, tuple(sorted(files)))
        except DataError as error:
            raise FetchError(str(error), final=True) from None

    return patience.until_done(f"the listing of {repository} at {revision}", ask)


def split_listing(listing: Listing, folder: str, config: DataConfig) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """Training and held-out files, by the names of folders or files, or else by the hash of the path."""
    within = [file for file in listing.files if f"{file[0]}/".startswith(f"{folder}/" if folder else "")]
    place = f"{listing.repository}/{folder}".rstrip("/") + f" at {listing.revision}"
    if not within:
        raise DataError(f"data.path={config.path!r}: there are no .parquet files in {place}")
    if config.validation_path:
        wanted = config.validation_path.removeprefix(f"{listing.repository}/").strip("/")
        held_out = [file for file in listing.files if file[0] == wanted or file[0].startswith(f"{wanted}/")]
        if not held_out:
            raise DataError(f"data.validation_path={config.validation_path!r}: no .parquet files in {place}")
    else:
        held_out = [file for file in listing.files if _is_of("held out", file[0])]
    rest = [file for file in within if file not in held_out]
    training = [file for file in rest if _is_of("train", file[0])] or rest
    if not training:
        raise DataError(f"data.path={config.path!r}: all of the .parquet files in {place} are held out")

    def files(entries: Sequence[tuple[str, int, str]]) -> list[CorpusFile]:
        return [
            CorpusFile(path, Path(listing.repository, path), size=size, digest=digest) for path, size, digest in entries
        ]

    if held_out:
        return files(training), files(held_out)
    return split_files(files(training), config.validation_fraction)


def _is_of(split: str, path: str) -> bool:
    return any(re.split(r"[^a-z]", part.lower())[0] in SPLITS[split] for part in path.split("/"))


class HubFiles:
    """The files of one run, read through the cache."""

    def __init__(self, config: DataConfig, run_dir: Path, report: Callable[[str], None]) -> None:
        from huggingface_hub import constants

        match = re.fullmatch(f"({NAME}/{NAME})(?:/(.*?))?/*", config.path)
        if not match or not _stays_below(match[2] or "x"):
            raise DataError(
                f"data.path={config.path!r} must be OWNER/NAME or OWNER/NAME/FOLDER of a dataset on the hub"
            )
        repository = match[1]
        home = Path(config.cache_dir) if config.cache_dir else Path(constants.HF_HOME, "jax_huginn")
        folder = home.expanduser() / repository.replace("/", "--")
        listing = _open_listing(repository, config.revision, run_dir / LISTING, folder, report)
        self.training, self.held_out = split_listing(listing, match[2] or "", config)
        size = sum(file.size or 0 for file in self.training)
        report(f"{repository} at {listing.commit[:12]}: {len(self.training)} files to train on, {size / 1e9:.3g} GB")

        def get(file: CorpusFile, part: Path, target: Path) -> None:
            fetch(repository, listing.commit, file, part, target, Patience(cache.pause, report))

        self._cache = cache = FileCache(folder, int(config.cache_gb * 1e9), get, report)
        self._streams: Sequence[int] = ()

    def own(self, streams: Sequence[int]) -> None:
        """Declare the streams that this process reads; raises `DataError` if their files do not fit into the cache."""
        self._streams = streams
        self._cache.own(len(streams), self.training, self.held_out)

    def opens(self, stream: int, visit: int, files: Sequence[CorpusFile]) -> None:
        """See `streams.Watcher`."""
        self._cache.opens(stream, visit, files)

    def local_pieces(self, rows: Rows, keep: bool) -> "Pieces":
        """`rows`, reading from the cache; `keep`: the files stay cached."""

        def pieces(file: CorpusFile, offset: int) -> Iterator[tuple[int, np.ndarray]]:
            with self._cache.open(file, keep) as path:
                yield from rows(file, offset, path=path)

        return pieces

    def handed_out(self, state: dict[str, Any]) -> None:
        """Release the files before the position `state`."""
        for stream, first, last in self._visits(state):
            self._cache.handed_out(stream, first, last)

    def saved(self, state: dict[str, Any]) -> None:
        """Keep the files that resuming from `state` reads first."""
        for stream, first, last in self._visits(state):
            self._cache.saved(stream, first, last)

    def _visits(self, state: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
        streams = zip(self._streams, state["streams"], state["reading"], strict=True)
        for stream, (_, epoch, file, *_), reading in streams:
            yield stream, epoch * len(self.training) + file, reading

    def close(self) -> None:
        """Stop fetching."""
        self._cache.close()


def _open_listing(repository: str, revision: str, kept: Path, folder: Path, report: Callable[[str], None]) -> Listing:
    """The run's listing, made at its start; if the hub cannot be reached, the latest one in the cache's folder."""
    if not kept.exists():
        spare = folder / f"listing_{re.sub(r'[^A-Za-z0-9.-]', '_', revision)}.json"
        try:
            patience = Patience(time.sleep, report, LISTING_ATTEMPTS)
            listing = fetch_listing(repository, revision, patience)
        except UnreachableError as error:
            if not spare.exists():
                raise
            listing = read_listing(spare)
            report(f"{error}; using the cached listing of {listing.commit[:12]}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            _write(spare, listing.text())
            _write(kept, listing.text(), replace_it=False)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be written: {error.strerror}") from None
    listing = read_listing(kept)
    if (listing.repository, listing.revision) != (repository, revision):
        raise DataError(f"{kept} lists {listing.repository} at {listing.revision}: name another --run_dir")
    return listing


def _write(file: Path, text: str, replace_it: bool = True) -> None:
    """Write a file atomically; if `replace_it` is false, the first of several processes wins."""
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        if replace_it:
            os.replace(name, file)
        else:
            os.link(name, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
