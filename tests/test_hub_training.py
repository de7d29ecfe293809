"""`train_jax.py` on the hub source: killed in the middle of a download and resumed, it equals an uninterrupted run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_huginn import load_checkpoint
from tests.hub.support import FILES, REPOSITORY, TRAIN, S, rows
from tests.hub_server import Fault, HubServer, digest, serving
from tests.support import HANGS

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
PRESET = """
import os

from tests.support import small_config

os.environ["HF_HUB_OFFLINE"] = "0"
def get_config():
    return small_config(
        train={"steps": %d, "batch_size": 4, "sequence_length": %d},
        data={"source": "hub", "path": %r, "streams": 2, "shuffle_window": 8},
        checkpoint={"every": 10},
        log={"tensorboard": False},
        validation={"every": 0, "sequences": 4, "depths": (1,)},
        # Little to compile: the data is what this is about.
        moe={"experts": 0},
        model={"prelude_layers": 0, "core_layers": 1, "coda_layers": 0},
        recurrence={"mean": 2, "backprop_depth": 2, "scheme": "fixed"},
    )
"""


def start(hub: HubServer, folder: Path, run: str, *options: str) -> subprocess.Popen[str]:
    preset = folder / "preset.py"
    preset.write_text(PRESET % (STEPS, S, REPOSITORY))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_verysecrettoken",
    }
    command = [sys.executable, "train_jax.py", "--config", str(preset), "--run_dir", str(folder / run), *options]
    with (folder / f"{run}.log").open("a") as output:  # the process has a handle of its own
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], log: Path) -> str:
    assert process.wait(HANGS) == 0, log.read_text()
    return log.read_text()


def records(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without the times, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "per_second" not in name} for line in lines]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_killed_while_it_downloads_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    files = FILES | {f"train/{index}.parquet": rows(40, index, bad=index % 3) for index in range(8)}
    log = tmp_path / "killed.log"
    with serving(files) as hub:
        finish(start(hub, tmp_path, "whole", "--data.cache_dir", str(tmp_path / "cache")), tmp_path / "whole.log")
        fetched = [request["file"] for request in hub.requests if request["file"] in TRAIN and request["host"] == "cdn"]
        hub.requests.clear()
        last = fetched[-1]
        hub.faults[last] = [Fault(drop_after=500, hang=60)]
        other = ("--data.cache_dir", str(tmp_path / "other"))
        process = start(hub, tmp_path, "killed", *other)
        part = tmp_path / "other" / REPOSITORY.replace("/", "--") / f"{digest(files[last])}.part"
        saved = tmp_path / "killed" / "checkpoints"
        wait_for(lambda: part.exists() and part.stat().st_size == 500 and any(saved.glob("[0-9]*")), process, log)
        process.kill()
        process.wait()
        hub.update(dict.fromkeys(files, rows(40, 9)))  # the branch moves on, the run does not
        output = finish(start(hub, tmp_path, "killed", *other), log)
    assert "resuming" in output
    assert [request["range"] for request in hub.downloads(last)] == [None, "bytes=500-"]
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert records(tmp_path / "killed")[-1]["step"] == STEPS
    assert records(tmp_path / "killed")[-1]["data_rows_skipped"] > 0
    assert "skipped: owner/rows/train/" in output
    left, right = (nnx.state(load_checkpoint(tmp_path / run)) for run in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    for path in [log, *(tmp_path / "killed").rglob("*")]:
        assert not path.is_file() or b"hf_verysecrettoken" not in path.read_bytes()
