"""Checkpoints that can be trusted: damage is found, the newest good one is used, a failed save costs a line."""

import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksums
from jax_huginn.checkpoints.load import find_step
from jax_huginn.checkpoints.save import Checkpoints
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.checkpoints.step_folders import CheckpointError, DamagedError, retire, seal, steps_in, verify
from jax_huginn.config.compatibility import MAY_BE_ACCEPTED, changes
from jax_huginn.config.schema import CheckpointConfig, Config, TrainConfig
from jax_huginn.parallel.mesh import make_mesh
from jax_huginn.training.step import TrainState, init_state
from jax_huginn.training.step import abstract_state as sharded_state
from tests.support import small_config

ROOT = Path(__file__).parent.parent


@functools.cache
def abstract_state(config) -> TrainState:
    return jax.eval_shape(lambda: init_state(config))


def state_at(config, step: int) -> TrainState:
    """Random numbers in the shape of a training state."""
    random = np.random.default_rng(step)
    state = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape) * 9, x.dtype), abstract_state(config))
    return TrainState(state.params, state.opt_state, jnp.int32(step), jnp.int32(step // 4))


class Position:
    """Stand-in for the training batches: their position."""

    def __init__(self, rows: int):
        self.rows = rows

    def get_state(self):
        return {"process": [0, 1], "order": {}, "rows": self.rows, "streams": [[0] * 6], "skipped": [[0] * 4]}

    def set_state(self, state):
        self.rows = state["rows"]


def one_device():
    return make_mesh(Config(train=TrainConfig(batch_size=1)), jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three checkpoints: its config, its folder."""
    config, folder = small_config(), tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, config.checkpoint)
    for step in (4, 8, 12):
        checkpoints.save(state_at(config, step), Position(step), config)
    checkpoints.close()
    return config, folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(saved[1], tmp_path / "run")
    return saved[0], tmp_path / "run"


def flip(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place if place >= 0 else len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_restores(config, folder: Path, step: int) -> list[str]:
    """Resume from `step`, bit for bit, and return what the run printed."""
    said: list[str] = []
    checkpoints, data = Checkpoints(folder, config.checkpoint, said.append), Position(0)
    state = checkpoints.restore(sharded_state(config, one_device()), data)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, state_at(config, step))
    assert data.rows == step
    return said


# ---- Room -----------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_said_before_training(tmp_path, monkeypatch):
    config = small_config()
    state, said = abstract_state(config), []
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
    checkpoints = Checkpoints(tmp_path / "not" / "there", config.checkpoint, said.append)
    for free, lines in ((size * (config.checkpoint.keep + 1), 0), (size, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        checkpoints.require_room(state)
        assert len(said) == lines
    assert f"will write {config.checkpoint.keep + 1} more (checkpoint.keep=" in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    with pytest.raises(CheckpointError, match=r"GB of free disk, and a checkpoint takes .*name another --run_dir"):
        checkpoints.require_room(state)
    checkpoints.close()


@pytest.mark.parametrize(
    "section",
    [
        {"optimizer": {"learning_rate": 1e-5, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.0}},
        {"train": {"batch_size": 8, "micro_batches": 2}, "moe": {"balance_weight": 0.0}},
    ],
)
def test_changes_that_may_be_accepted_keep_the_optimiser(run, section):
    """`checkpoint.accept_changes`: a new rate, schedule, decay or batch size restores the same moments, bit for bit."""
    config, folder = run
    changed = small_config(**section)
    named = [change.name for change in changes(config, changed)]
    assert named
    assert set(named) <= set(MAY_BE_ACCEPTED)
    assert_restores(changed, folder, 12)


# ---- Damage ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_bit_for_bit(run):
    config, folder = run
    assert steps_in(folder / "checkpoints") == [4, 8, 12]
    assert assert_restores(config, folder, 12) == []
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "4", "8"]


def test_every_file_of_a_checkpoint_is_covered(run):
    step = run[1] / "checkpoints/12"
    files = [file for file in step.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            flip(file, place)
            with pytest.raises(DamagedError):
                verify(step)
        file.write_bytes(content[:-1])
        with pytest.raises(DamagedError):
            verify(step)
        file.unlink()
        with pytest.raises(DamagedError):
            verify(step)
        file.write_bytes(content)
    verify(step)


def test_a_lost_line_of_the_checksums_does_not_uncover_a_file(run):
    file = run[1] / "checkpoints/12/checksums.json"
    content = json.loads(file.read_text())
    content["files"].pop("data/metadata")
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=r"checksums\.json is not what was written"):
        verify(file.parent)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def largest(step: Path) -> Path:
    return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


DAMAGES = {
    "flipped": lambda step: flip(largest(step)),
    "truncated": lambda step: os.truncate(largest(step), 100),
    "empty": empty,
    "without an item": lambda step: shutil.rmtree(step / "optimizer"),
    "without checksums": lambda step: (step / "checksums.json").unlink(),
    "checksums of others": lambda step: shutil.copy(step.parent / "4/checksums.json", step),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_kept_and_passed_over(run, damage):
    config, folder = run
    DAMAGES[damage](folder / "checkpoints/12")
    (line,) = assert_restores(config, folder, 8)
    assert line.startswith("warning: ") and "checkpoints/12 is damaged (" in line and "\n" not in line
    assert "kept as 12.damaged" in line
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12.damaged", "4", "8"]
    # The run reaches step 12 again and is struck again: both are kept.
    checkpoints = Checkpoints(folder, config.checkpoint)
    checkpoints.save(state_at(config, 12), Position(12), config)
    checkpoints.close()
    DAMAGES[damage](folder / "checkpoints/12")
    assert "kept as 12.damaged-2" in assert_restores(config, folder, 8)[0]


def test_arrays_that_were_written_wrong_are_found_though_their_files_are_whole(run):
    config, folder = run
    step = folder / "checkpoints/12"
    sums = verify(step)
    sums["optimizer"][next(iter(sums["optimizer"]))] = "00000000"
    seal(step, sums)
    verify(step)
    (line,) = assert_restores(config, folder, 8)
    assert "does not hold the values that were saved" in line


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run):
    config, folder = run
    for step in (4, 8, 12):
        flip(largest(folder / f"checkpoints/{step}"))
    for _ in range(2):  # and says so again the next time
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            Checkpoints(folder, config.checkpoint)
    assert len(list((folder / "checkpoints").glob("*.damaged"))) == 3


def test_readers_pass_over_damage_and_leave_the_run_as_it_is(run, capsys):
    config, folder = run
    flip(folder / "checkpoints/12/meta/metadata")
    flip(largest(folder / "checkpoints/8/optimizer"))  # of no interest to them
    assert find_step(folder).name == "8"
    assert "12 is damaged" in capsys.readouterr().err
    model = load_checkpoint(folder)
    np.testing.assert_array_equal(model.wte[...], state_at(config, 8).params["wte"])
    with pytest.raises(CheckpointError, match="12 is damaged: meta/metadata is not what was written"):
        load_checkpoint(folder / "checkpoints/12")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "4", "8"]


def test_readers_compare_the_arrays_too(run):
    folder = run[1]
    step = folder / "checkpoints/12"
    sums = verify(step)
    sums["params"]["wte"] = "00000000"
    seal(step, sums)
    with pytest.raises(DamagedError, match="params wte does not hold the values"):
        load_checkpoint(folder)


def test_what_a_kill_leaves_behind_is_no_checkpoint(run):
    config, folder = run
    shutil.copytree(folder / "checkpoints/12", folder / "checkpoints/.unfinished/16")
    (folder / "checkpoints/.unfinished/16/checksums.json").unlink()
    assert find_step(folder).name == "12"
    assert assert_restores(config, folder, 12) == []
    assert not (folder / "checkpoints/.unfinished").exists()


# ---- Keeping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(2, 0, [50, 60]), (1, 20, [20, 40, 60]), (9, 0, [10, 20, 30, 40, 50, 60])]
)
def test_the_newest_are_kept_and_every_so_many(tmp_path, keep, every, left):
    for step in range(10, 70, 10):
        (tmp_path / str(step)).mkdir()
    (tmp_path / "20.damaged").mkdir()
    retire(tmp_path, keep, every)
    assert steps_in(tmp_path) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*map(str, left), "20.damaged"])


def test_a_save_that_fails_costs_a_line_and_the_next_one_succeeds(run):
    config, folder = run
    said: list[str] = []
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1), said.append)
    hindrance = folder / "checkpoints/.unfinished"
    hindrance.write_text("a file where a folder should be")
    checkpoints.save(state_at(config, 16), Position(16), config)
    assert checkpoints.latest_step() == 12
    (line,) = said
    assert line.startswith("error: checkpoint 16 was not written to ") and "\n" not in line
    assert "exists" in line and "the newest one is step 12" in line
    hindrance.unlink()
    checkpoints.save(state_at(config, 20), Position(20), config)
    assert checkpoints.latest_step() == 20
    checkpoints.close()
    assert steps_in(folder / "checkpoints") == [20]
    assert assert_restores(config, folder, 20) == []


def test_a_failure_in_the_background_is_reported_too(run, monkeypatch):
    config, folder = run

    def no_room(*_):
        raise OSError(28, "No space left on device")

    said: list[str] = []
    checkpoints = Checkpoints(folder, config.checkpoint, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(step_folders, "seal", no_room)
        checkpoints.save(state_at(config, 16), Position(16), config)
        assert checkpoints.latest_step() == 12
    assert "(No space left on device); the newest one is step 12" in said[0]
    checkpoints.save(state_at(config, 16), Position(16), config)
    assert checkpoints.latest_step() == 16
    checkpoints.close()


def test_checksums_name_every_array(saved):
    config, folder = saved
    content = json.loads((folder / "checkpoints/12/checksums.json").read_text())
    state = state_at(config, 12)
    assert content["arrays"]["params"] == as_hex(checksums(state.params))
    assert len(content["arrays"]["optimizer"]) == len(jax.tree.leaves(state.opt_state))
    assert step_folders.CHECKSUMS not in content["files"]
