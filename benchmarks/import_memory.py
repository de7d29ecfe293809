"""Host memory of importing or loading 3.565 B parameters.

    python -m benchmarks.import_memory [--dtype bfloat16] [--folder DIR]
    JAX_PLATFORMS=cpu python -m benchmarks.import_memory --load bfloat16 [--from-run]

Makes a Hugging Face folder of huginn-0125's shape from made-up numbers (7.8 GB in bfloat16), imports it by the command
that a user types, in a process of its own, and prints that process's largest resident size. Both folders are removed
again; they need 23 GB of disk in `--folder`.

With `--load` the folder, or the run it was imported to, is loaded as generation loads it, to compute in that type. On
the CPU the host's memory is also the device's, so the size includes the weights; `of_weights` is it divided by theirs.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import parse, report
from configs.huginn_3_5b import get_config
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.interop.foreign_weights import (
    EMBEDDING,
    FLOATS,
    FREQUENCIES,
    LM_HEAD,
    frequencies,
    tensor_shapes,
)
from jax_huginn.interop.huggingface import SHARD_BYTES
from jax_huginn.interop.model_config import huggingface_config
from jax_huginn.interop.safetensors_files import write_shards
from jax_huginn.model.huginn import abstract_model

LOAD = """
import sys
import jax
from jax_huginn.checkpoints.sources import load_for_inference, open_source
from jax_huginn.model.functional import params_of
jax.block_until_ready(params_of(load_for_inference(open_source(sys.argv[1]), sys.argv[2])))
"""


def make_folder(folder: Path, overrides: list[str], dtype: str) -> int:
    """Write the made-up checkpoint; returns its number of parameters."""
    config = override(get_config(), overrides)
    number = next(number for number, name in FLOATS.items() if name == dtype)
    shapes = tensor_shapes(config, abstract_model(config)[1])
    declared = {name: (shape, number if name != FREQUENCIES else np.dtype("f4")) for name, shape in shapes.items()}
    block = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(number)

    def tensors():
        for name, (shape, _) in declared.items():
            yield name, frequencies(config) if name == FREQUENCIES else np.resize(block, shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(config, dtype)))
    write_shards(folder, declared, tensors(), SHARD_BYTES)
    assert shapes[LM_HEAD] == shapes[EMBEDDING]
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if name not in (LM_HEAD, FREQUENCIES))


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the made-up folder")
    parser.add_argument("--load", choices=("bfloat16", "float32"), help="load into this type in place of importing")
    parser.add_argument("--from-run", action="store_true", help="with --load: import first, and load the run")
    parser.add_argument("--folder", default=".", help="where the two folders are made and removed")
    options, overrides = parse(parser)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parameters = make_folder(Path(name, "huginn"), overrides, options.dtype)
        start = time.perf_counter()
        command = [sys.executable, "-m", "jax_huginn.import_checkpoint", f"{name}/huginn", "--out", f"{name}/run"]
        if options.load:
            if options.from_run:  # an import takes less memory than the weights
                subprocess.run(command, check=True, stdout=sys.stderr)
            source = f"{name}/run" if options.from_run else f"{name}/huginn"
            command = [sys.executable, "-c", LOAD, source, options.load]
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    weights = options.load and parameters * np.dtype(options.load).itemsize
    report(
        benchmark="load_memory" if options.load else "import_memory",
        parameters=parameters,
        dtype=options.dtype,
        **({"load": options.load, "from_run": options.from_run, "of_weights": peak / weights} if weights else {}),
        peak_gigabytes=round(peak / 1e9, 2),
        seconds=round(seconds, 1),
    )


if __name__ == "__main__":
    run_verb(main)
