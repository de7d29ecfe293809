"""Kill a training run again and again, resume it each time, and compare it bit for bit with one that was left alone.

    python scripts/chaos.py                        # 25 kills of the default training made small; about 6 minutes
    python scripts/chaos.py --kills 3 --steps 30   # a quick look
    python scripts/chaos.py --data.source hub ...  # any other option of train_jax.py goes to both runs

The kills are SIGKILL, at moments drawn from --seed: while the run starts, within a step, within a save. Compared are
the final parameters, in every checkpoint that both runs still have the checksums of parameters and optimiser and the
position of the data, and every record of the loss curve but its times. Ends with status 1 where anything differs. Where
a kill lands depends on the machine's speed too: a seed repeats the plan, not the microsecond.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

from jax_huginn.config.cli import OneLineParser, parse_config, run_verb

TIMES = {"tokens_per_second", "tflops_per_second", "mfu"}
SMALL = shlex.split("""--model.width 32 --model.mlp_width 48 --model.vocab_size 512 --moe.width 16 --train.batch_size 4
    --train.micro_batches 2 --train.sequence_length 64 --optimizer.warmup_steps 4 --optimizer.cooldown_steps 0
    --checkpoint.every 8 --validation.every 24 --validation.sequences 2 --log.every 5""")
STARTING, SAVING = 0.2, 0.5
"""Share of the kills before the first step of a life, and share of the others that wait for a save."""
PATIENCE = 300  # seconds that a life may take


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--config", default=str(ROOT / "configs/moe.py"))
    parser.add_argument("--out", type=Path, help="folder to create for both runs; a temporary one if not given")
    options, others = parser.parse_known_args()
    parse_config(["--config", options.config, *others])  # a mistake is reported here, not in the log of a run
    began = time.monotonic()
    if options.out:
        options.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        print(f"seed {options.seed}, {options.kills} kills, {options.steps} steps, in {folder}", flush=True)
        reference, victim = Run(folder / "reference", options, others), Run(folder / "victim", options, others)
        reference.start()
        if reference.process.wait(PATIENCE):
            sys.exit(f"the run that was left alone failed:\n{reference.log.read_text()[-2000:]}")
        phases = kill_often(victim, options.kills, options.steps, random.Random(options.seed))
        differences = compare(reference.folder, victim.folder)
    result = {"kills": sum(phases.values()), **phases, "lives": victim.lives, "steps": options.steps}
    result |= {"differences": len(differences), "seconds": round(time.monotonic() - began)}
    print("\n".join(differences[:20]))
    print(json.dumps(result))
    sys.exit(bool(differences) or sum(phases.values()) < options.kills)


class Run:
    """A run folder and the process that trains it at the moment."""

    def __init__(self, folder: Path, options: argparse.Namespace, others: list[str]):
        self.folder, self.log, self.lives = folder, folder.with_suffix(".log"), 0
        self.command = [sys.executable, str(ROOT / "train_jax.py"), "--config", options.config, *SMALL]
        self.command += ["--train.steps", str(options.steps), "--run_dir", str(folder), *others]
        # Compiled once for all lives: that is not what is tried here.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
        self.environment = {"PYTHONPATH": str(ROOT)} | os.environ | cache

    def start(self) -> None:
        self.lives += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log, cwd=ROOT)

    def last_step(self) -> int:
        """The step of the last whole record."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
                return json.loads(file.read().split(b"\n")[-2])["step"]
        except (OSError, ValueError, LookupError):
            return 0

    def is_saving(self) -> bool:
        return (self.folder / "checkpoints/.unfinished").is_dir()

    def wait_for(self, condition) -> bool:
        """False where the process ended first."""
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def kill_often(victim: Run, kills: int, steps: int, moments: random.Random) -> Counter:
    """Train to the end in spite of `kills` kills; how many hit which phase."""
    phases = Counter({"starting": 0, "in a step": 0, "in a save": 0})
    seconds_to_start = 6.0
    while sum(phases.values()) < kills:
        before, began = victim.last_step(), time.monotonic()
        victim.start()
        if moments.random() < STARTING:
            at = began + moments.uniform(0, seconds_to_start)
            victim.wait_for(lambda at=at, seen=before: time.monotonic() > at or victim.last_step() > seen)
        else:
            # Resuming cuts the records back to the restored step: a later one is this life's.
            target = min(before + moments.randint(1, max(1, int(1.4 * steps / kills))), steps - 1)
            if not victim.wait_for(lambda goal=target: victim.last_step() >= goal):
                break
            seconds_to_start = 0.8 * (time.monotonic() - began)
            if moments.random() < SAVING:
                victim.wait_for(victim.is_saving)
                time.sleep(moments.uniform(0, 0.15))
            else:
                victim.wait_for(lambda: not victim.is_saving())
                time.sleep(moments.uniform(0, 0.02))
        if victim.process.poll() is not None:
            break  # it was faster
        victim.kill()
        # What a kill within a save left behind is cleared by the next life as it starts.
        phase = "starting" if victim.last_step() <= before else "in a save" if victim.is_saving() else "in a step"
        phases[phase] += 1
        print(f"kill {sum(phases.values())}: {phase}, step {victim.last_step()}", flush=True)
    if victim.process.poll() == 0 and victim.last_step() == steps:
        return phases
    victim.start()
    if victim.process.wait(PATIENCE):
        sys.exit(f"the run that was killed does not resume:\n{victim.log.read_text()[-2000:]}")
    return phases


def compare(left: Path, right: Path) -> list[str]:
    """Every difference in words; none where the kills left no trace."""
    import jax
    import numpy as np
    from flax import nnx

    from jax_huginn import load_checkpoint

    differences = []
    models = (nnx.as_pure(nnx.split(load_checkpoint(folder))[1]) for folder in (left, right))
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(model) for model in models), strict=True)
    for (path, a), (_, b) in pairs:
        if not np.array_equal(a, b):
            differences.append(f"parameter {jax.tree_util.keystr(path)} differs")

    ours, theirs = ({int(path.name) for path in (run / "checkpoints").glob("[0-9]*")} for run in (left, right))
    if max(ours) != max(theirs):
        differences.append(f"the last checkpoints are {max(ours)} and {max(theirs)}")
    for step in sorted(ours & theirs):
        folders = [run / "checkpoints" / str(step) for run in (left, right)]
        sums = [json.loads((folder / "checksums.json").read_text())["arrays"] for folder in folders]
        if sums[0] != sums[1]:
            differences.append(f"checkpoint {step}: arrays differ")
        places = [json.loads((folder / "data/metadata").read_text()) for folder in folders]
        if places[0] != places[1]:
            differences.append(f"checkpoint {step}: the data's position differs")

    curves = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    if len(curves[0]) != len(curves[1]):
        differences.append(f"{len(curves[0])} and {len(curves[1])} records")
    for a, b in zip(*curves, strict=False):
        keys = sorted(key for key in (a.keys() | b.keys()) - TIMES if a.get(key) != b.get(key))
        if keys:
            differences.append(f"record of step {a['step']}: {', '.join(keys)} differ")
    return differences


if __name__ == "__main__":
    run_verb(main)
