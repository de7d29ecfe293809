"""Meshes: what is refused, what launchers say, and all of tests/parallel_cases on 8 devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import ParallelConfig
from jax_huginn.model.initializers import random_state
from jax_huginn.parallel import processes
from jax_huginn.parallel.mesh import mesh_sizes, require_fit
from jax_huginn.parallel.processes import by_launcher
from tests.support import HANGS

ROOT = Path(__file__).parent.parent
CASES = sorted((ROOT / "tests/parallel_cases").glob("*_cases.py"))


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_on_eight_devices(file):
    """In a process of its own, since the number of CPU devices is fixed when JAX starts; it fails where they miss."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=HANGS, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize(
    ("sections", "devices", "words"),
    [
        ({"parallel": {"data": 2, "fsdp": 2}}, 8, "make 4 devices, there are 8"),
        ({"parallel": {"fsdp": 3}}, 8, "3 does not divide the 8 device"),
        ({"parallel": {"fsdp": 16}, "model": {"width": 40, "heads": 2, "kv_heads": 2}}, 16, "model.width=40 must be"),
        ({"parallel": {"expert": 8}, "train": {"batch_size": 8}}, 8, "moe.experts=4 must be divisible by"),
        ({"parallel": {"expert": 2}, "moe": {"experts": 0}, "train": {"batch_size": 8}}, 8, "a dense model"),
        ({"train": {"batch_size": 8, "micro_batches": 2}}, 8, "may be 1 or a divisor of it"),
    ],
)
def test_meshes_that_cannot_be_are_refused_with_the_numbers(make_config, sections, devices, words):
    config = make_config(**sections)
    with pytest.raises(ConfigError, match=words) as caught:
        require_fit(config, mesh_sizes(config, devices))
    assert "\n" not in str(caught.value)


def test_the_rest_is_filled_in(make_config):
    assert mesh_sizes(make_config(parallel={"fsdp": 2, "expert": 2}), 8) == (2, 2, 2)
    assert mesh_sizes(make_config(parallel={"data": 2, "fsdp": -1, "expert": 2}), 8) == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"parallel.data and parallel.fsdp are both -1"):
        ParallelConfig(fsdp=-1)
    with pytest.raises(ConfigError, match=r"the mesh belongs to the run: give parallel.data a number"):
        ParallelConfig(dispatch="all_to_all")


def test_a_device_draws_its_rows_of_the_initial_state_alone():
    whole = random_state(jax.random.key(3), (8, 5, 16), jax.numpy.float32)
    part = random_state(jax.random.key(3), (2, 5, 16), jax.numpy.float32, first_row=4)
    assert np.array_equal(whole[4:6], part)
    assert not np.array_equal(whole[0], whole[1])


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
SLURM_EIGHT = {**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}


@pytest.mark.parametrize(
    ("environment", "method", "devices"),
    [
        ({}, None, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None, None),
        ({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}, None, None),  # a batch script, not started by srun
        (SLURM_EIGHT, "slurm", [1]),
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, "slurm", []),
        ({**SLURM_EIGHT, "CUDA_VISIBLE_DEVICES": "1"}, "slurm", []),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "ompi", [3]),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None, None),  # a pod of no indexed job
    ],
)  # fmt: skip
def test_what_launchers_say(environment, method, devices):
    arguments = by_launcher(ParallelConfig(), environment)
    assert (arguments and arguments["cluster_detection_method"]) == method
    assert (arguments and arguments["local_device_ids"]) == devices


def test_an_interactive_step_of_one_task_is_alone():
    """`srun -n 1` within an allocation of four tasks: the step's own count decides."""
    step = {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert by_launcher(ParallelConfig(), step) is None


def test_a_missing_process_0_is_one_line(monkeypatch):
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ParallelConfig(coordinator=address, process_count=2, process_id=1)
    with pytest.raises(ConfigError, match=rf"process 0 does not answer at parallel.coordinator={address}"):
        processes.initialize(options)


def test_open_mpi_5_needs_an_address():
    with pytest.raises(ConfigError, match=r"set --parallel.coordinator HOST:PORT"):
        by_launcher(ParallelConfig(), OMPI)
    arguments = by_launcher(ParallelConfig(coordinator="h:1"), OMPI)
    assert arguments == {
        "coordinator_address": "h:1",
        "num_processes": 4,
        "process_id": 3,
        "local_device_ids": [3],
        "cluster_detection_method": "deactivate",
    }
