"""Checkpoints of a run: RUN/checkpoints/<step>/ by Orbax, written in the background, each one atomic and checked.

A step holds four items: `params`, `optimizer`, `data` (the exact position) and `meta` (config and versions), the last
two JSON. No pickle is involved. `step_folders` says how a step comes into being and how damage is found.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

import jax_huginn.model.huginn as huginn
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import CheckpointConfig, Config
from jax_huginn.data.position import whole_position
from jax_huginn.parallel.mesh import replicated, shardings
from jax_huginn.parallel.processes import gather_text, of_first
from jax_huginn.training import step_folders
from jax_huginn.training.checksums import as_hex, checksums
from jax_huginn.training.step import TrainState, init_state
from jax_huginn.training.step_folders import CHECKPOINTS, UNFINISHED, CheckpointError, DamagedError

__all__ = ["CHECKPOINTS", "CheckpointError", "Checkpoints", "config_of", "find_step", "load_checkpoint", "load_config",
           "load_step", "restore_params"]  # fmt: skip

_SAVED = ("params", "optimizer")  # the items whose arrays have checksums of their own


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
        # Orbax logs a traceback for every failure, of which `_failed` makes a line, and so does asyncio for its tasks.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _without_late_answers
        self._writer = _new_writer()
        self._commit: threading.Thread | None = None
        if jax.process_index() == 0:
            step_folders.clear(self.folder)
        self._newest = self._find_newest()

    def latest_step(self) -> int | None:
        """The newest step that is whole; waits for one that is being written."""
        self.wait()
        return self._newest

    def save(self, state: TrainState, data: Any, config: Config) -> None:
        """Start writing the state after `state.step` steps; returns once the arrays are on the host.

        Args:
            data: the training batches, `data.pipeline.TrainBatches`.
        """
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
        self.say(f"error: checkpoint {step} was not written to {self.shown} ({_reason(error)}); {self._still()}")

    def _still(self) -> str:
        return "there is none yet" if self._newest is None else f"the newest one is step {self._newest}"

    def restore(self, data: Any, config: Config, mesh: Mesh) -> TrainState:
        """The state of the newest step, split over this mesh whatever mesh wrote it; sets `data` to its position.

        A step whose arrays are not what was saved is set aside, and the one before it is taken.
        """
        self.wait()
        while (step := self._newest) is not None:
            try:
                return self._restore(step, data, config, mesh)
            except DamagedError as fault:
                self._set_aside([fault])
                self._newest = self._find_newest()
        raise CheckpointError(f"no checkpoint in {self.shown}")

    def _restore(self, step: int, data: Any, config: Config, mesh: Mesh) -> TrainState:
        abstract = jax.eval_shape(lambda: init_state(config))
        items = {
            "params": ocp.args.StandardRestore(nnx.to_pure_dict(_split(abstract.params, mesh))),
            "optimizer": ocp.args.StandardRestore(_split(abstract.opt_state, mesh)),
            "data": ocp.args.JsonRestore(),
            "meta": ocp.args.JsonRestore(),
        }
        folder = self.folder / str(step)
        restored, saved = _read(folder, **items), step_folders.array_sums(folder)
        for item in _SAVED:
            _compare(self.shown / str(step), item, restored[item], saved)
        data.set_state(restored["data"])
        params = abstract.params
        nnx.replace_by_pure_dict(params, restored["params"])
        counters = (replicated(np.int32(count), mesh) for count in (step, restored["meta"].get("skipped", 0)))
        return TrainState(nnx.as_pure(params), restored["optimizer"], *counters)

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


def _without_late_answers(unraisable: Any) -> None:
    """Python's report of an error that nobody can catch, but for TensorStore's threads: once a save has failed, they
    still answer to its event loop, which is closed by then."""
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _new_writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _reason(error: BaseException) -> str:
    """What the operating system said, which TensorStore wraps into a paragraph."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"OS error \d+: ([^\]\[]+?)\]", str(error))
    return found[1] if found else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def gather_position(part: dict[str, Any]) -> dict[str, Any]:
    """The whole position in the data from every process's part."""
    return whole_position([json.loads(text) for text in gather_text(json.dumps(part))])


# ---- Reading --------------------------------------------------------------------------------------------------------


def find_step(run_or_step: str | os.PathLike) -> Path:
    """The step folder that a path means: itself, or the newest good step of a run folder.

    Its parameters and its config are compared with their checksums. A damaged step of a run is passed over, with a
    line on stderr; nothing is moved, since the run may be in training.

    Raises:
        CheckpointError: none there, or only damaged ones.
    """
    path = Path(run_or_step)
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint folder at {path}")
    if (path / "params").is_dir() or (path / step_folders.CHECKSUMS).is_file():
        step_folders.verify(path, _MODEL)
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest, faults = step_folders.newest_good(folder, _MODEL)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(
            f"every checkpoint in {path} is damaged"
            if faults
            else f"no checkpoint in {path}: train first, or name a run folder or a step folder"
        )
    return folder / str(newest)


_MODEL = ("params", "meta")


def load_config(run_or_step: str | os.PathLike) -> Config:
    """The config that a checkpoint was written with."""
    return config_of(find_step(run_or_step))


def load_checkpoint(run_or_step: str | os.PathLike) -> huginn.MoEHuginnModel:
    """The model of a run's newest good checkpoint, or of one step folder; its `config` attribute is the run's.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    return load_step(find_step(run_or_step))


def load_step(step: Path) -> huginn.MoEHuginnModel:
    """The model of a step folder that `find_step` gave, which has read all its files once to compare them.

    Raises:
        DamagedError: its values are not those that were saved.
    """
    graphdef, params = huginn.abstract_model(config_of(step))
    return nnx.merge(graphdef, restore_params(step, _placed(params)))


def restore_params(step: Path, abstract: Any) -> Any:
    """The parameters in a step folder, typed and placed as the `abstract` ones are.

    Raises:
        DamagedError: their values are not those that were saved.
    """
    kind = config_of(step).model.param_dtype  # as they were saved: the checksums are of that type
    saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding), abstract)
    restored = _read(step, params=ocp.args.StandardRestore(nnx.to_pure_dict(saved)))["params"]
    _compare(step, "params", restored, step_folders.array_sums(step))
    restored = jax.tree.map(lambda x, target: x.astype(target.dtype), restored, nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, restored)
    return nnx.as_pure(abstract)


def config_of(step: Path) -> Config:
    """The config of a step folder that `find_step` gave."""
    try:
        return from_dict(json.loads((step / "meta/metadata").read_text(encoding="utf-8"))["config"])
    except ConfigError as error:
        raise CheckpointError(f"{step}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{step}: its config cannot be read ({type(error).__name__})") from None


def _read(step: Path, **items: Any) -> Any:
    """Some of the items of a step folder, each by its `ocp.args`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(step.resolve(), args=ocp.args.Composite(**items))


def _compare(step: Path, item: str, arrays: Any, saved: step_folders.ArraySums) -> None:
    """Raises DamagedError where an array is not what was saved."""
    for name, value in as_hex(checksums(arrays)).items():
        if saved.get(item, {}).get(name) != value:
            raise DamagedError(step, f"{item} {name} does not hold the values that were saved")


def _split(tree: Any, mesh: Mesh) -> Any:
    """The abstract arrays, to be restored as each device's part of them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings(tree, mesh)
    )


def _placed(tree: Any) -> Any:
    """The abstract arrays, to be restored onto the default device whatever device they were saved from."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
