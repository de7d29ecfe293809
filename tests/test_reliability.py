"""A run as a whole: killed, out of disk space, asked to stop in time, and silent about secrets."""

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import HANGS

ROOT = Path(__file__).parent.parent
SMALL = shlex.split("""--model.width 16 --model.heads 2 --model.kv_heads 2 --model.mlp_width 24 --model.vocab_size 300
    --moe.experts 0 --train.batch_size 2 --train.sequence_length 32 --recurrence.mean 2 --recurrence.backprop_depth 1
    --model.prelude_layers 0 --model.coda_layers 0 --optimizer.warmup_steps 2 --optimizer.cooldown_steps 0
    --validation.sequences 2 --validation.depths 1 --validation.every 0 --log.every 5""")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(6):
        (folder / f"{index}.txt").write_text(f"a tale of {index} foxes and of their ways. " * 100)
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def start(corpus, environment, tmp_path):
    """Starts a training run in a process of its own; ends it with the test."""
    processes = []

    def begin(*options: str, **variables: str) -> subprocess.Popen[str]:
        line = [sys.executable, str(ROOT / "train_jax.py"), "--config", str(ROOT / "configs/moe.py"), *SMALL]
        line += ["--data.source", "text", "--data.path", str(corpus), "--run_dir", str(tmp_path / "run"), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(line, env=environment | variables, cwd=tmp_path, **pipes))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_until(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_survives_a_full_disk_and_saves_once_there_is_room(start, tmp_path):
    """The limit on file sizes lets no write pass, as a full disk does; it is lifted while the run continues."""
    process = start("--train.steps", "1000000", "--checkpoint.every", "40", "--checkpoint.keep", "100")
    checkpoints, metrics = tmp_path / "run/checkpoints", tmp_path / "run/metrics.jsonl"
    wait_until((checkpoints / "40").is_dir)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
    assert process.stdout is not None
    lines = []
    while not any(line.startswith("error: ") for line in lines):
        lines.append(process.stdout.readline())
    while "metrics.jsonl cannot be written" not in "".join(lines):
        lines.append(process.stdout.readline())
    assert process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    (failure,) = {line for line in lines if line.startswith("error: ")} if len(lines) < 20 else [lines[-1]]
    assert " was not written to " in failure and "(File too large); the newest one is step " in failure
    failed = int(failure.split()[2])
    wait_until(lambda: any(int(path.name) > failed for path in checkpoints.glob("[0-9]*")))
    process.terminate()
    rest, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM: saved step" in rest
    assert "Traceback" not in errors, errors
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))  # what could not be written was kept
    assert steps[-1] == max(int(path.name) for path in checkpoints.glob("[0-9]*"))


def test_a_second_job_is_kept_out_of_a_run_folder(start, tmp_path):
    first = start("--train.steps", "1000000", "--checkpoint.every", "20")
    wait_until((tmp_path / "run/checkpoints/20").is_dir)
    second = start("--checkpoint.resume", "false", "--checkpoint.overwrite", "true")
    _, errors = second.communicate(timeout=HANGS)
    assert second.returncode == 2
    assert errors.startswith(f"error: run_dir={tmp_path / 'run'} is in use by another job: ")
    assert errors.count("\n") == 1
    assert first.poll() is None
    assert any((tmp_path / "run/checkpoints").glob("[0-9]*"))
    first.kill()
    first.wait()
    third = start("--train.steps", "1")  # the kill has freed it
    printed, errors = third.communicate(timeout=HANGS)
    assert third.returncode == 0, errors
    assert "is finished" in printed


def test_a_last_save_that_fails_ends_in_one_line_and_the_same_command_mends_it(start, tmp_path):
    options = ("--train.steps", "20", "--checkpoint.every", "10", "--log.tensorboard", "false")
    blocked = tmp_path / "run/checkpoints"
    blocked.mkdir(parents=True)
    (blocked / ".unfinished").write_text("not a folder")
    process = start(*options)
    printed, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 2
    assert (
        errors
        == "error: step 20 was not saved; fix the cause and rerun the same command to resume from the beginning\n"
    )
    assert printed.count("error: checkpoint 10 was not written") == printed.count("error: checkpoint 20 was not") == 1
    (blocked / ".unfinished").unlink()
    process = start(*options)
    printed, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert (blocked / "20").is_dir()


def test_a_run_stops_before_the_job_s_end_and_prints_no_secret(start, tmp_path):
    end = int(time.time()) + 60 + 25
    process = start(
        "--train.steps", "1000000", "--checkpoint.save_before_timeout", "1m",
        SLURM_JOB_END_TIME=str(end), WANDB_API_KEY="s3cret-of-wandb", HF_TOKEN="s3cret-of-the-hub",
    )  # fmt: skip
    printed, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert end - 61 < time.time() < end - 30
    assert "stopped by the job's end in 1m: saved step" in printed
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 20
    for text in (printed, errors, *(file.read_bytes().decode("latin-1") for file in files)):
        assert "s3cret" not in text
    assert not (tmp_path / "run/wandb").exists()


def test_chaos_in_short(corpus):
    """Two kills; `scripts/chaos.py` alone makes 25."""
    line = [sys.executable, str(ROOT / "scripts/chaos.py"), "--kills", "2", "--steps", "24", "--seed", "3", *SMALL]
    line += ["--data.source", "text", "--data.path", str(corpus), "--log.tensorboard", "false"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=HANGS, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["kills"], report["differences"]) == (2, 0)
    assert report["lives"] >= 3
