"""Save and restore a run: RUN/checkpoints/<step>/ by Orbax, written in the background, atomic, and verified.

A step folder holds four items: `params`, `optimizer`, `data` (the exact position) and `meta` (config and versions); the
last two are JSON. Nothing is pickled. `step_folders` says how a step folder appears and how damage is found.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksums
from jax_huginn.checkpoints.load import compare_arrays, read_items
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, UNFINISHED, CheckpointError, DamagedError
from jax_huginn.config.dicts import to_dict
from jax_huginn.config.schema import CheckpointConfig, Config
from jax_huginn.data.resume import whole_position
from jax_huginn.files import reason
from jax_huginn.parallel.mesh import from_every_host
from jax_huginn.parallel.processes import gather_text, of_first

_SAVED = ("params", "optimizer")  # the items whose arrays have checksums of their own
State = TypeVar("State")
"""A training state: a dataclass with `params`, `opt_state`, `step` and `skipped`."""


class Batches(Protocol):
    """What is saved of the training data: this process's position in it."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, position: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder, for the run itself.

    A save that fails costs a line and nothing else: the checkpoints before it stay, and the next save is a new try.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, say: Callable[[str], None] = print):
        """
        Args:
            say: shows a line to the person; called from a thread too.

        Raises:
            CheckpointError: there were checkpoints, and all of them are damaged.
        """
        # Orbax takes a relative path and fails late.
        self.folder, self.config, self.say = (run_dir / CHECKPOINTS).resolve(), config, say
        self.shown = run_dir / CHECKPOINTS
        self._writer = _new_writer()
        self._commit: threading.Thread | None = None
        if jax.process_index() == 0:
            step_folders.clear(self.folder)
        self._newest = self._find_newest()

    def latest_step(self) -> int | None:
        """The newest step that is whole; waits for one that is being written."""
        self.wait()
        return self._newest

    def save(self, state: Any, data: Batches, config: Config) -> None:
        """Start writing `state`, a `State` after `state.step` steps; returns once its arrays are on the host."""
        self.wait()
        step = int(state.step)
        if step == self._newest:
            return
        params = nnx.to_pure_dict(state.params)
        sums = {"params": checksums(params), "optimizer": checksums(state.opt_state)}  # on their way
        meta = {"step": step, "skipped": int(state.skipped), "config": to_dict(config), "jax": jax.__version__}
        items = {
            "params": ocp.args.StandardSave(params),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "data": ocp.args.JsonSave(gather_position(data.get_state())),
            "meta": ocp.args.JsonSave(meta),
        }
        unfinished = self.folder / UNFINISHED / str(step)
        try:
            if jax.process_index() == 0:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
            self._writer.save(unfinished, args=ocp.args.Composite(**items))
        except Exception as error:
            self._failed(step, error)
            return
        self._commit = threading.Thread(target=self._finish, args=(step, unfinished, sums), name="checkpoint")
        self._commit.start()

    def _finish(self, step: int, unfinished: Path, sums: dict[str, Any]) -> None:
        """In the background: wait for the files, seal them and make them a checkpoint."""
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                step_folders.seal(unfinished, {item: as_hex(sums[item]) for item in _SAVED})
                step_folders.commit(unfinished, self.folder / str(step))
        except Exception as error:
            self._failed(step, error)
            return
        self._newest = step
        try:
            if jax.process_index() == 0:
                step_folders.retire(self.folder, self.config.keep, self.config.keep_every)
        except OSError as error:
            self.say(f"warning: old checkpoints in {self.shown} cannot be deleted ({error.strerror})")

    def _failed(self, step: int, error: Exception) -> None:
        if jax.process_index() == 0:
            step_folders.clear(self.folder)  # a full disk gets its room back
        self._writer = _new_writer()  # the old one may hold on to what went wrong
        self.say(f"error: checkpoint {step} was not written to {self.shown} ({reason(error)}); {self._still()}")

    def _still(self) -> str:
        return "there is none yet" if self._newest is None else f"the newest one is step {self._newest}"

    def require_room(self, state: Any) -> None:
        """Look at the free disk before a run that could not be saved; a warning if `checkpoint.keep` do not fit.

        Raises:
            CheckpointError: not one more checkpoint of `state` fits.
        """
        leaves = jax.tree.leaves((nnx.to_pure_dict(state.params), state.opt_state))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        room = f"{self.shown.parent} has {free / 1e9:.3g} GB of free disk, and a checkpoint takes {size / 1e9:.3g} GB"
        if free < size:
            raise CheckpointError(f"{room}: free some, or name another --run_dir")
        # The oldest goes after the newest is whole, so one more than are kept.
        if free < size * (missing := self.config.keep + 1 - len(step_folders.steps_in(self.folder))):
            self.say(f"warning: {room}: the run will write {missing} more (checkpoint.keep={self.config.keep})")

    def restore(self, abstract: State, data: Batches) -> State:
        """The state of the newest step, with the shapes, types and shardings of `abstract`, whatever mesh wrote it;
        sets `data` to its position.

        A step whose arrays differ from what was saved is set aside, and the one before it is taken.
        """
        self.wait()
        while (step := self._newest) is not None:
            try:
                return self._restore(step, abstract, data)
            except DamagedError as fault:
                self._set_aside([fault])
                self._newest = self._find_newest()
        raise CheckpointError(f"no checkpoint in {self.shown}")

    def _restore(self, step: int, abstract: Any, data: Batches) -> Any:
        items = {
            "params": ocp.args.StandardRestore(nnx.to_pure_dict(abstract.params)),
            "optimizer": ocp.args.StandardRestore(abstract.opt_state),
            "data": ocp.args.JsonRestore(),
            "meta": ocp.args.JsonRestore(),
        }
        folder = self.folder / str(step)
        restored, saved = read_items(folder, **items), step_folders.array_sums(folder)
        for item in _SAVED:
            compare_arrays(self.shown / str(step), item, restored[item], saved)
        data.set_state(restored["data"])
        params = abstract.params
        nnx.replace_by_pure_dict(params, restored["params"])
        counts = {"step": step, "skipped": restored["meta"].get("skipped", 0)}
        return dataclasses.replace(
            abstract,
            params=nnx.as_pure(params),
            opt_state=restored["optimizer"],
            **{
                name: from_every_host(np.asarray(count, np.int32), abstract.step.sharding)
                for name, count in counts.items()
            },
        )

    def _find_newest(self) -> int | None:
        """The newest whole step; what is damaged is set aside. All processes get the same answer."""
        found = -1
        if jax.process_index() == 0:
            newest, faults = step_folders.newest_good(self.folder)
            found = -1 if newest is None else newest
            self._set_aside(faults)
        found = of_first(found)
        if found < 0 and any(self.folder.glob("*.damaged*")):
            raise CheckpointError(
                f"every checkpoint in {self.shown} is damaged (they are kept there): put a whole one back, or name "
                "another --run_dir"
            )
        return None if found < 0 else found

    def _set_aside(self, faults: list[DamagedError]) -> None:
        for fault in faults:
            kept = step_folders.set_aside(self.folder / fault.step.name) if jax.process_index() == 0 else None
            if kept:
                self.say(f"warning: {self.shown / fault.step.name} is damaged ({fault.what}): kept as {kept.name}")

    def wait(self) -> None:
        """Block until the last save is on disk, or has failed and said so."""
        if self._commit:
            self._commit.join()
            self._commit = None

    def close(self) -> None:
        self.wait()
        self._writer.close()


def _new_writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def gather_position(part: dict[str, Any]) -> dict[str, Any]:
    """The whole position in the data from every process's part."""
    return whole_position([json.loads(text) for text in gather_text(json.dumps(part))])
