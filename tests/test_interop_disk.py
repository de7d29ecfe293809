"""Import and export beside others who use the disk: it may be full, and a run in training deletes old steps."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_huginn.checkpoints import sources, step_folders
from jax_huginn.checkpoints.import_run import write_run
from jax_huginn.interop.huggingface import write_huggingface
from jax_huginn.interop.names import params_of
from tests.support import random_model, small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    model = random_model(small_config())
    write_run(params_of(model), model.config, folder / "run")
    write_huggingface(model, folder / "hf")
    return folder / "run"


@pytest.mark.parametrize(
    ("verb", "source", "out"), [("export", "run", "x.pth"), ("export", "run", "x"), ("import_checkpoint", "hf", "x")]
)
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(run, tmp_path, verb, source, out):
    """No file may grow beyond 2 kB, which the system reports as it reports a full disk."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, f"jax_huginn.{verb}", str(run.parent / source), "--out"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    answer = subprocess.run(
        [*command, str(tmp_path / out)], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stderr == f"error: {tmp_path / out} cannot be written: File too large\n"
    assert answer.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_retired_while_it_is_read_is_replaced_by_a_newer_one(run, tmp_path, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    expected = params_of(sources.load_checkpoint(run))
    restore, newest = sources.restore_params, 0

    def while_training(step, target):
        nonlocal newest
        if newest < 3:
            newest += 1
            shutil.copytree(step, run / f"checkpoints/{newest}")
            step_folders.retire(run / "checkpoints", keep=1, keep_every=0)
        return restore(step, target)

    monkeypatch.setattr(sources, "restore_params", while_training)
    found, model = sources.open_and_load(run)
    assert found.path == run / "checkpoints/3"
    jax.tree.map(np.testing.assert_array_equal, params_of(model), expected)


def test_a_step_that_is_retired_while_it_is_verified_is_not_damaged(run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    verify, seen = step_folders.verify, []

    def while_training(step, items=None):
        seen.append(step.name)
        if len(seen) == 1:
            shutil.copytree(step, step.with_name("1"))
            step_folders.retire(step.parent, keep=1, keep_every=0)
        return verify(step, items)

    monkeypatch.setattr(step_folders, "verify", while_training)
    assert sources.open_source(run).path == run / "checkpoints/1"
    assert seen == ["0", "1"]
    assert capsys.readouterr().err == ""
