"""Weak scaling: a step on one device, then on several with as many sequences on each, for every split of the state.

    python benchmarks/weak_scaling.py --config configs/moe_3_8b.py --devices 2 --compute.remat dots

Each case is a process of its own. Prints the JSON line of `train_step.py` for it, and last one line with the share of
one device's tokens/s that each of the several reaches.
"""

import json
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import parse
from jax_huginn.config.cli import OneLineParser, run_verb


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a preset; --section.field changes it")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch on each device")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--depth", default="25,8", metavar="N,K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--splits", nargs="*", default=["fsdp", "expert", "data"])
    options, overrides = parse(parser)
    command = [sys.executable, str(Path(__file__).with_name("train_step.py")), "--config", options.config]
    command += ["--batch", str(options.batch), "--micro-batches", str(options.micro_batches)]
    command += ["--depths", options.depth, "--repeats", str(options.repeats)]

    def tokens_per_second(devices: int, *mesh: str) -> float:
        done = subprocess.run(
            [*command, "--devices", str(devices), *overrides, *mesh], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"train_step.py failed with {' '.join(mesh) or 'one device'}, see above")
        print(done.stdout, end="", flush=True)
        return json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]

    alone = tokens_per_second(1)
    shares = {}
    for split in options.splits:
        mesh = ["--parallel.data", "1", f"--parallel.{split}", str(options.devices)]
        shares[split] = tokens_per_second(options.devices, *mesh) / options.devices / alone
    print(json.dumps({"benchmark": "weak_scaling", "devices": options.devices, "share_of_one": shares}))


if __name__ == "__main__":
    run_verb(main)
