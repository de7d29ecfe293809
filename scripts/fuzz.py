"""Feed damaged inputs to everything that reads a file of others; only the project's own one-line errors may come out.

    python scripts/fuzz.py --cases 250             # of each target; 76 s of CPU time on 2 cores, Python 3.11
    python scripts/fuzz.py --target pth --seed 7

Targets: `pth` and `pickle` (damage under the archive's checksums), `safetensors`, `huggingface` (config.json and the
index of shards), and the same four as `torch_reference` reads them, `twin pth` and so on; `config` (a run's
config.json); `checkpoint` (every file of a step folder; also a meta file that is damaged before the checksums are
made). Damage: bits, bytes and ranges changed, cut, doubled; in JSON also values
replaced by others that parse, fields lost or renamed, numbers scaled. A case that raises anything else, writes more
than a line or takes 20 s is a failure and is printed; `--target T --seed S --first NUMBER --cases 1` repeats it. The
peak of memory is reported at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import torch_reference
from jax_huginn.checkpoints.import_run import import_weights
from jax_huginn.checkpoints.load import config_of, find_step
from jax_huginn.checkpoints.run_folder import open_run_folder
from jax_huginn.checkpoints.step_folders import CheckpointError, seal, verify
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.dicts import to_dict
from jax_huginn.config.schema import Config, ModelConfig, MoEConfig, RecurrenceConfig, TrainConfig
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.huggingface import write_huggingface
from jax_huginn.interop.open_weights import open_weights
from jax_huginn.interop.pth import write_pth
from jax_huginn.model.huginn import abstract_model

OWN_ERRORS = (WeightsError, ConfigError, CheckpointError, torch_reference.CheckpointError)
SECONDS = 20
CONFIG = Config(
    model=ModelConfig(vocab_size=16, width=8, heads=2, kv_heads=2, mlp_width=8, prelude_layers=1, core_layers=1,
                      coda_layers=1, max_length=16, dtype="float32"),
    moe=MoEConfig(experts=2, active=1, width=4),
    recurrence=RecurrenceConfig(mean=2, backprop_depth=1),
    train=TrainConfig(sequence_length=16),
)  # fmt: skip
STRANGE = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e400, float("nan"), -0.5, "", "x", "\n", "\x1b[2J", "../../etc",
           "9" * 5000, [], [[]], {}, {"a": 1}, [1, 2, 3]]  # fmt: skip


# ---- Damage ---------------------------------------------------------------------------------------------------------


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Content after one to three changes, which cluster at the beginning, where formats keep what matters."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        size = len(data)
        place = int(size * chance.random() ** chance.choice((1, 3)))
        length = min(chance.choice((1, 2, 8, 64, 1000)), size - place)
        match chance.randrange(8):
            case 0 if size:
                data[min(place, size - 1)] ^= 1 << chance.randrange(8)
            case 1 if size:
                data[min(place, size - 1)] = chance.randrange(256)
            case 2:
                data[place : place + length] = chance.randbytes(length)
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                del data[place:]
            case 6:
                data[place : place + length] = bytes(length)
            case 7:
                other = chance.randrange(size + 1)
                data[place:place] = data[other : other + length]
    return bytes(data)


def damaged_json(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, or valid JSON in which values are exchanged for strange ones, or fields are lost or renamed."""
    if chance.random() < 0.4:
        return damaged(content, chance)
    tree = json.loads(content)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        parent, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[chance.choice(("", "x", "\n", "__class__", key + "_"))] = parent.pop(key)
            case 2 if isinstance(parent[key], int | float):
                parent[key] = parent[key] * chance.choice((-1, 1000, 0.5, 2**40))
            case _:
                parent[key] = chance.choice(STRANGE)
    if chance.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


# ---- Targets: each takes a folder of good files, damages a copy and reads it ----------------------------------------


def damage(file: Path, chance: random.Random, how: Callable[[bytes, random.Random], bytes] = damaged) -> None:
    file.write_bytes(how(file.read_bytes(), chance))


def read_weights(path: Path) -> None:
    for tensor in jax.tree.leaves(open_weights(path).params()):
        tensor.read()


def try_pth(folder: Path, chance: random.Random, read: Callable[[Path], None]) -> None:
    damage(folder / "model.pth", chance)
    read(folder / "model.pth")


def try_pickle(folder: Path, chance: random.Random, read: Callable[[Path], None]) -> None:
    with zipfile.ZipFile(folder / "model.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))
    entries[pickled] = damaged(entries[pickled], chance)
    if chance.random() < 0.2:
        name = chance.choice([*entries])
        entries[name] = damaged(entries[name], chance)
    with zipfile.ZipFile(folder / "model.pth", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    read(folder / "model.pth")


def try_safetensors(folder: Path, chance: random.Random, read: Callable[[Path], None]) -> None:
    file = chance.choice(sorted((folder / "hf").glob("*.safetensors")))
    if chance.random() < 0.5:
        damage(file, chance)
    else:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = damaged_json(content[8 : 8 + length], chance)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    read(folder / "hf")


def try_huggingface(folder: Path, chance: random.Random, read: Callable[[Path], None]) -> None:
    damage(folder / "hf" / chance.choice(("config.json", "model.safetensors.index.json")), chance, damaged_json)
    read(folder / "hf")


def read_by_twin(path: Path) -> None:
    torch_reference.load_checkpoint(path)


def try_config(folder: Path, chance: random.Random) -> None:
    damage(folder / "run/config.json", chance, damaged_json)
    open_run_folder(dataclasses.replace(CONFIG, run_dir=str(folder / "run")))


def try_checkpoint(folder: Path, chance: random.Random) -> None:
    step = folder / "run/checkpoints/0"
    if chance.random() < 0.5:  # behind checksums that fit, as whoever means harm would do it
        damage(step / "meta/metadata", chance, damaged_json)
        seal(step, verify(step, items=()))
    else:
        file = chance.choice(sorted(file for file in step.rglob("*") if file.is_file()))
        if chance.random() < 0.1:
            file.unlink()
        else:
            damage(file, chance, damaged_json if file.name in ("checksums.json", "metadata") else damaged)
    with redirect_stderr(io.StringIO()):  # where the damaged step is reported
        config_of(find_step(folder / "run"))


TARGETS = {
    "pth": partial(try_pth, read=read_weights),
    "pickle": partial(try_pickle, read=read_weights),
    "safetensors": partial(try_safetensors, read=read_weights),
    "huggingface": partial(try_huggingface, read=read_weights),
    "twin pth": partial(try_pth, read=read_by_twin),
    "twin pickle": partial(try_pickle, read=read_by_twin),
    "twin safetensors": partial(try_safetensors, read=read_by_twin),
    "twin huggingface": partial(try_huggingface, read=read_by_twin),
    "config": try_config,
    "checkpoint": try_checkpoint,
}


def make_files(folder: Path) -> None:
    """One small model in every layout."""
    graphdef, params = abstract_model(CONFIG)
    numbers = np.random.default_rng(0)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(numbers.standard_normal(x.shape), x.dtype), params))
    write_pth(model, folder / "model.pth")
    write_huggingface(model, folder / "hf", shard_bytes=3000)
    import_weights(open_weights(folder / "hf"), folder / "run")
    # The run is read as one that trains: its own config, and no step 0 in the way of `open_run_folder`.
    (folder / "run/config.json").write_text(json.dumps(to_dict(CONFIG)))


def run_case(target: str, good: Path, work: Path, seed: int, number: int) -> str:
    """The outcome of one case: `read`, the name of an error of ours, or a line that begins with FAILED."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    parts = {"pth": "model.pth", "pickle": "model.pth", "safetensors": "hf", "huggingface": "hf"}
    part = parts.get(target.split()[-1], "run")
    (shutil.copytree if (good / part).is_dir() else shutil.copy)(good / part, work / part)
    if target == "config":
        shutil.rmtree(work / "run/checkpoints")
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again and again: a garbage collector may swallow one
    try:
        TARGETS[target](work, random.Random(f"{seed} {target} {number}"))
    except OWN_ERRORS as error:
        text = str(error)
        if text.isprintable() and len(text) < 2000:
            return type(error).__name__
        return f"FAILED: not one line: {text[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"FAILED: {type(error).__name__}: {str(error)[:300]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def fuzz(targets: list[str], cases: int, seed: int, first: int = 0) -> tuple[dict[str, Counter], list[str]]:
    """Outcomes by target, and the failures."""
    outcomes, failures = {}, []
    before = signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as name:
        good = Path(name, "good")
        good.mkdir()
        make_files(good)
        for target in targets:
            outcomes[target] = Counter()
            for number in range(first, first + cases):
                outcome = run_case(target, good, Path(name, "work"), seed, number)
                outcomes[target][outcome.split(":")[0]] += 1
                if outcome.startswith("FAILED"):
                    failures.append(f"{target} {number}: {outcome}")
    signal.signal(signal.SIGALRM, before)
    return outcomes, failures


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", choices=TARGETS, action="append", help="all if not given")
    options = parser.parse_args()
    began = time.monotonic()
    outcomes, failures = fuzz(options.target or [*TARGETS], options.cases, options.seed, options.first)
    print("\n".join(failures[:50]))
    for target, counts in outcomes.items():
        print(json.dumps({"target": target, "seed": options.seed, **counts}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps({"failures": len(failures), "seconds": round(time.monotonic() - began), "peak_GB": round(peak, 2)})
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    run_verb(main)
