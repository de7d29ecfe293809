"""How long a save holds the training loop, and what the checks of a checkpoint cost; one JSON line.

    python benchmarks/checkpoint_stall.py --config configs/moe.py --folder /a/disk [--section.field value ...]

`held` is the time in `Checkpoints.save`, in which no step can start; `step` is one of the same config at its mean
depth; `slowdown` is how much longer steps take while the files are written and hashed in the background.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks.common import parse
from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksums
from jax_huginn.checkpoints.save import Checkpoints
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.training.step import init_state, jit_train_step


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; the temporary folder if not given")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--config", required=True)
    options, overrides = parse(parser)
    config = override(load_config(options.config), overrides)
    shape = (config.train.batch_size, config.train.sequence_length)
    tokens = np.zeros(shape, np.int32)
    mean, backprop_depth = config.recurrence.mean, config.recurrence.backprop_depth
    depth = [np.full(config.train.micro_batches, r, np.int32) for r in (max(mean - backprop_depth, 0), backprop_depth)]
    step = jit_train_step(config)
    state = jax.jit(lambda: init_state(config))()
    position = {"process": [0, 1], "order": {}, "rows": 0, "streams": [[0] * 6] * 8, "skipped": [[0] * 4] * 8}
    data: Any = SimpleNamespace(get_state=lambda: position)  # all that a save asks of it

    def timed_step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, tokens, tokens, *depth)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    timed_step()
    alone = statistics.median(timed_step() for _ in range(10))
    held, whole, beside = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = Checkpoints(Path(folder), config.checkpoint)
        for _ in range(options.saves + 1):  # the first one compiles the checksums
            timed_step()
            began = time.perf_counter()
            checkpoints.save(state, data, config)
            held.append(time.perf_counter() - began)
            while checkpoints._commit and checkpoints._commit.is_alive():
                beside.append(timed_step())
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
        newest = Path(folder, step_folders.CHECKPOINTS, str(checkpoints.latest_step()))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        began = time.perf_counter()
        step_folders.verify(newest)
        verify = time.perf_counter() - began
        checkpoints.close()
    began = time.perf_counter()
    as_hex(checksums((state.params, state.opt_state)))
    arrays = time.perf_counter() - began
    held_s = statistics.median(held[1:])
    result = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "checkpoint_MB": round(size / 1e6, 1),
        "step_s": round(alone, 3), "held_s": round(held_s, 3), "held_steps": round(held_s / alone, 3),
        "held_of_first_s": round(held[0], 3), "save_whole_s": round(statistics.median(whole[1:]), 3),
        "slowdown": round(statistics.median(beside) / alone, 2) if beside else None,
        "array_checksums_s": round(arrays, 3), "verify_files_s": round(verify, 3),
        "verify_GB_per_s": round(size / verify / 1e9, 2),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    run_verb(main)
