"""Dense, experts at the injection, experts in the core, fixed depth, 8-bit matmuls: trained alike on real text.

    python benchmarks/real_text.py --out runs/linux --gpus 2 --together 3 > benchmarks/results/real_text.jsonl

Runs `train_jax.py --config configs/linux.py` for every setting and seed, `--together` of them on each GPU, and measures
what is finished with `held_out.py`; all seeds of a setting come before the next one. With `--limit SECONDS` it stops in
time, and the same command resumes. Options of the trainer may follow (--train.steps 100). Lines: one for each run, then
one for each pair of settings whose runs are all there.

Every setting executes the same FLOPs a token in training, to 0.6 %, and sees the same tokens in the same order.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.held_out import ratio
from jax_huginn.config.cli import OneLineParser, run_verb, split_options

CONFIG = "configs/linux.py"
SETTINGS = {
    "dense": [],
    "injection": ["--moe.experts", "8", "--moe.width", "512", "--model.mlp_width", "1024"],
    "core": ["--moe.experts", "8", "--moe.width", "384", "--moe.placement", "core"],
    # The sampled depths have a mean of one more than recurrence.mean.
    "fp8": ["--compute.fp8", "true"],
    "fixed": ["--recurrence.scheme", "fixed", "--recurrence.mean", "9"],
}
COMPARED = (1, 2, 4, 8, 16, 32)
RESERVE = 45  # seconds that measuring a run takes
RESULT, ROWS = "held_out.json", "held_out.npz"  # of a run, from held_out.py


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="runs at once on each GPU (1)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which runs are saved")
    own, overrides = split_options(sys.argv[1:])
    options = parser.parse_args(own)
    train(options, overrides)
    for setting, seed in itertools.product(options.settings, options.seeds):
        result = _folder(options, setting, seed) / RESULT
        if result.exists():
            print(result.read_text().strip())
    for one, other in itertools.combinations(options.settings, 2):
        compare(options, one, other)


# ---- Training -------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, overrides: list[str]) -> None:
    end = time.monotonic() + options.limit
    jobs: queue.Queue[tuple[str, int]] = queue.Queue()
    for job in itertools.product(options.settings, options.seeds):
        jobs.put(job)

    def work(gpu: int) -> None:
        while True:
            try:
                setting, seed = jobs.get_nowait()
            except queue.Empty:
                return
            if end - time.monotonic() > 2 * RESERVE or (_folder(options, setting, seed) / RESULT).exists():
                _run(options, setting, seed, gpu, overrides, end)

    workers = [
        threading.Thread(target=work, args=(gpu,)) for gpu in range(options.gpus) for _ in range(options.together)
    ]
    for worker in workers:
        worker.start()
        time.sleep(0.2)  # so that the jobs are taken in order
    for worker in workers:
        worker.join()


def _folder(options: argparse.Namespace, setting: str, seed: int) -> Path:
    return options.out / f"{setting}_{seed}"


def _run(options: argparse.Namespace, setting: str, seed: int, gpu: int, overrides: list[str], end: float) -> None:
    folder = _folder(options, setting, seed)
    if (folder / RESULT).exists():
        return
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.together:.2f}",
        "JAX_COMPILATION_CACHE_DIR": str((options.out / "compiled").resolve()),
    }
    command = [
        "train_jax.py", "--config", CONFIG, "--run_dir", str(folder), "--train.seed", str(seed), *SETTINGS[setting],
    ]  # fmt: skip
    if end < float("inf"):
        command += ["--checkpoint.time_limit", f"{max(end - time.monotonic() - RESERVE, 1):.0f}s"]
        command += ["--checkpoint.save_before_timeout", "5s"]
    print(f"{setting}, seed {seed}, GPU {gpu}: training", file=sys.stderr)
    done = _logged([*command, *overrides], folder, environment)
    finished = done and "finished" in (folder.with_suffix(".log")).read_text().rsplit("$ ", 1)[-1]
    if not finished:
        print(f"{setting}, seed {seed}: not finished, see {folder.with_suffix('.log')}", file=sys.stderr)
        return
    measured = _logged(["benchmarks/held_out.py", str(folder), "--setting", setting], folder, environment)
    print(f"{setting}, seed {seed}: {'measured' if measured else 'trained, not measured'}", file=sys.stderr)


def _logged(command: list[str], folder: Path, environment: dict[str, str]) -> bool:
    """Run a command of this repository, its output appended to FOLDER.log; whether it succeeded."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        print("$", *command, file=log, flush=True)
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode == 0


# ---- Comparing ------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, one: str, other: str) -> None:
    """Print how much less `one` needs than `other`: means over the seeds, paired by row."""
    files = [[_folder(options, name, seed) / ROWS for seed in options.seeds] for name in (one, other)]
    if not all(file.exists() for each in files for file in each):
        return
    loaded = [[np.load(file) for file in each] for each in files]
    bytes_B = loaded[0][0]["bytes_B"]
    nats_SRB, other_SRB = (np.stack([run["nats_RB"] for run in runs]) for runs in loaded)
    line: dict[str, Any] = {"benchmark": "real_text_difference", "of": one, "to": other, "seeds": options.seeds}
    for r in COMPARED:
        rows_B = nats_SRB[:, r - 1].mean(0) - other_SRB[:, r - 1].mean(0)
        value, error = ratio(rows_B, bytes_B)
        by_seed = [ratio(nats, bytes_B)[0] for nats in nats_SRB[:, r - 1] - other_SRB[:, r - 1]]
        line[f"r{r}"] = {
            "bits_per_byte": round(value, 5),
            "standard_error": round(error, 5),
            "by_seed": [round(each, 5) for each in by_seed],
        }
    print(json.dumps(line))


if __name__ == "__main__":
    run_verb(main)
