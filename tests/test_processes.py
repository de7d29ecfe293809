"""Two processes on one machine, by `train_jax.py` and its flags: they train like one, agree, stop and fail together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jax_huginn import load_checkpoint
from jax_huginn.parallel.processes import failed_in_xla
from tests.support import HANGS

ROOT = Path(__file__).parent.parent
PRESET = """
from jax_huginn.config.schema import *

def get_config():
    return Config(
        model=ModelConfig(vocab_size=300, width=16, heads=2, kv_heads=2, mlp_width=24, prelude_layers=0, core_layers=1,
            coda_layers=0, max_length=16, dtype="float32"),
        compute=ComputeConfig(remat="none"),
        moe=MoEConfig(experts=2, active=1, width=8),
        recurrence=RecurrenceConfig(mean=3, backprop_depth=2),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=6, batch_size=4, sequence_length=16),
        data=DataConfig(source="text", path={path!r}, streams=2, shuffle_window=4, validation_fraction=0.3),
        validation=ValidationConfig(every=0, sequences=4, depths=(2,)),
        checkpoint=CheckpointConfig(every=3),
        log=LogConfig(every=2, tensorboard=False),
        parallel=ParallelConfig(fsdp=2, data=1, heartbeat_seconds=10),
    )
"""
# The command, with a fault: this process draws another depth at step 5.
OTHER_DEPTHS = """
import sys
from jax_huginn.config.cli import parse_config, run_verb
from jax_huginn.training import loop

def draw(config, seed, step, micro_batches, true=loop.sample_depths):
    n, k = true(config, seed, step, micro_batches)
    return (n + 1, k) if step == 4 else (n, k)

loop.sample_depths = draw
run_verb(lambda: loop.train(parse_config(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["the", "quick", "brown", "fox", "jumps", "over", "a", "dog"], (8, 300))
    for index, row in enumerate(words):
        (folder / f"{index}.txt").write_text(" ".join(row))
    file = tmp_path_factory.mktemp("preset") / "preset.py"
    file.write_text(PRESET.format(path=str(folder)))
    return file


def start(preset: Path, run_dir: Path, *arguments: str, devices: int = 1, script: tuple[str, ...] = ()):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}",
    }
    line = [sys.executable, *(script or (str(ROOT / "train_jax.py"),)), "--config", str(preset)]
    return subprocess.Popen(
        [*line, "--run_dir", str(run_dir), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=preset.parent,
    )


def start_two(preset: Path, run_dir: Path, *arguments: str, only_second: tuple[str, ...] = (), script=()):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = ("--parallel.coordinator", f"localhost:{port}", "--parallel.process_count", "2")
    return [
        start(
            preset,
            run_dir,
            *arguments,
            *flags,
            "--parallel.process_id",
            str(number),
            *(only_second if number else ()),
            script=script if number else (),
        )
        for number in range(2)
    ]


def finish(processes) -> list[tuple[int, str, str]]:
    """Exit status and outputs of each; a process that hangs fails the test."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=HANGS)
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


def records_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(run_dir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.as_pure(nnx.split(load_checkpoint(run_dir))[1]))]


@pytest.fixture(scope="module")
def two(preset, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two processes of one device each: its folder and what each printed."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    results = finish(start_two(preset, run_dir))
    assert [status for status, _, _ in results] == [0, 0], results
    return run_dir, [out for _, out, _ in results]


@pytest.fixture(scope="module")
def one(preset, tmp_path_factory) -> tuple[Path, str]:
    """A run of one process of two devices: its folder and what it printed."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    [(status, out, err)] = finish([start(preset, run_dir, devices=2)])
    assert status == 0, err
    return run_dir, out


def test_two_processes_train_like_one_and_only_the_first_speaks(one, two):
    """One process of the same mesh reads all rows, two read every other one."""
    run_dir, printed = two
    assert "mesh: data 1 x fsdp 2 x expert 1 on 2 devices, 2 processes" in printed[0]
    assert "finished 6 steps" in printed[0]
    assert [line for line in printed[1].splitlines() if not line.startswith("[Gloo]")] == []
    assert "on 2 devices, 1 process" in one[1]
    ours, theirs = records_of(run_dir), records_of(one[0])
    assert [record["step"] for record in ours] == list(range(1, 7))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "objective", "grad_norm", "n", "k"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), (a["step"], name)
    assert ours[-1]["val_loss_r2"] == pytest.approx(theirs[-1]["val_loss_r2"], rel=1e-6)
    for a, b in zip(weights_of(run_dir), weights_of(one[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_one_process_resumes_as_two(preset, one, two, tmp_path):
    """Three steps in one process, three more in two, on another mesh: the run of two from the start."""
    run_dir = tmp_path / "run"
    shutil.copytree(one[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints/6")  # as if it had been killed after step 3 was saved
    results = finish(start_two(preset, run_dir, "--parallel.fsdp", "1", "--parallel.data", "2"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert f"resuming {run_dir} from step 3" in results[0][1]
    losses = [[record["loss"] for record in records_of(folder)] for folder in (run_dir, two[0])]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_processes_of_different_configs_say_so(preset, tmp_path):
    results = finish(start_two(preset, tmp_path / "run", only_second=("--train.seed", "1")))
    for number, (status, _, err) in enumerate(results):
        assert status == 2
        assert f"error: process {number} of 2: the config must be the same on every process: train.seed is 0 on " in err
        assert "1 on process 1" in err
        assert "Traceback" not in err


def test_processes_that_draw_other_depths_say_so(preset, tmp_path):
    results = finish(start_two(preset, tmp_path / "run", script=("-c", OTHER_DEPTHS)))
    for status, _, err in results:
        assert status == 2
        assert "the depths must be the same on every process: (n, k) of step 5 is" in err


def wait_for(process, beginning: str) -> None:
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


# With full remat the step has one gradient path, so it compiles sooner; these tests are about how a run ends.
ENDLESS = ("--train.steps", "100000", "--compute.remat", "full")


def test_a_signal_to_one_process_stops_both_after_one_step(preset, tmp_path):
    first, second = start_two(preset, tmp_path / "run", *ENDLESS)
    wait_for(first, "step 4")
    second.send_signal(signal.SIGTERM)  # the one that writes nothing
    results = finish([first, second])
    assert [status for status, _, _ in results] == [0, 0], results
    assert "stopped by SIGTERM: saved step" in results[0][1]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute(preset, tmp_path, killed):
    processes = start_two(preset, tmp_path / "run", *ENDLESS)
    wait_for(processes[0], "step 4")
    processes[killed].kill()
    begin = time.monotonic()
    status, _, err = finish(processes)[1 - killed]
    assert time.monotonic() - begin < 60
    assert status != 0
    ours = f"process {1 - killed} of 2: another process ended or the network failed"
    # JAX's watch over the processes ends the program by itself when it notices before a collective does.
    assert ours in err or "the JAX distributed service detected fatal errors" in err
    assert "Traceback" not in err


def test_an_error_of_xla_differs_from_ours():
    """Whether the program is called for the first time, or again by JAX's shorter way, which raises another type."""
    fails = []

    def callback(x):
        if fails:
            raise RuntimeError("the connection is gone")
        return x

    shape = jax.ShapeDtypeStruct((4,), np.float32)
    first, again = (jax.jit(lambda x: jax.pure_callback(callback, shape, x) + 1) for _ in range(2))
    again(np.ones(4, np.float32)).block_until_ready()
    fails.append(True)
    for program in (first, again):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
            program(np.ones(4, np.float32)).block_until_ready()
        assert failed_in_xla(caught.value)
    assert failed_in_xla(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert failed_in_xla(ValueError("NOT_FOUND: no such task"))
    assert not failed_in_xla(ValueError("axis 2 is out of bounds"))
    assert not failed_in_xla(RuntimeError("INTERNAL: ours"))
