"""Our JAX model against our Torch twin under torch.compile: the same maths on the same device, one after the other.

    python benchmarks/against_torch.py --config configs/huginn_3_5b.py --compute.remat dots --compute.unroll true
    python benchmarks/against_torch.py --config configs/moe.py --batch 8 --n 1 --k 3 --optimizer       # on a CPU

Forward and backward of one batch in `model.dtype`; with --optimizer the full step: master weights in
`model.param_dtype`, clipping and AdamW. Torch compiles each block, as its users do; a whole recurrent model takes it
many minutes. Each side runs in a process of its own, so that neither holds the other's memory. Both start from the
initialisation of the paper and see the same tokens, so their losses must agree to 2 %; that the two models are equal
to rounding is what parity_tests prove.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import median_seconds, parse, peak_gigabytes, report
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config
from jax_huginn.training.startup import keep_freed_memory


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--n", type=int, default=25)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--optimizer", action="store_true", help="the full step")
    parser.add_argument("--side", choices=["jax", "torch"], help=argparse.SUPPRESS)
    options, overrides = parse(parser)
    config = load_config(options.config)
    train = dataclasses.replace(config.train, batch_size=options.batch, micro_batches=1)
    config = override(dataclasses.replace(config, train=train), overrides)
    rows = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (options.batch, config.train.sequence_length + 1)
    )
    if options.side:
        keep_freed_memory()  # as train_jax.py does; Torch on a CPU gains by it, too
        run = run_jax if options.side == "jax" else run_torch
        print(json.dumps(run(config, rows.astype(np.int32), options)))
        return

    sides = {side: measure_in_a_process(side) for side in ("torch", "jax")}
    losses = [side["loss"] for side in sides.values()]
    assert abs(losses[0] / losses[1] - 1) < 0.02, f"the losses differ: {losses}"
    tokens = rows[:, 1:].size
    report(
        benchmark="against_torch",
        config=Path(options.config).stem,
        settings=overrides,
        batch=options.batch,
        sequence_length=config.train.sequence_length,
        n=options.n,
        k=options.k,
        optimizer=options.optimizer,
        jax_tokens_per_second=tokens / sides["jax"]["seconds"],
        torch_tokens_per_second=tokens / sides["torch"]["seconds"],
        ratio=sides["torch"]["seconds"] / sides["jax"]["seconds"],
        jax_peak_gb=sides["jax"]["peak_gb"],
        torch_peak_gb=sides["torch"]["peak_gb"],
        torch=sides["torch"]["version"],
        losses=losses,
    )


def measure_in_a_process(side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the {side} side failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def run_jax(config: Config, rows: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    import jax

    from jax_huginn.model.parameters import cast_params
    from jax_huginn.training.step import init_params, init_state, jit_train_step, make_gradient

    batch = jax.device_put((rows[:, :-1], rows[:, 1:]))
    if options.optimizer:
        state = jax.jit(lambda: init_state(config))()
        step = jit_train_step(config)
        depths = np.array([options.n], np.int32), np.array([options.k], np.int32)
        first_loss = None

        def run():
            nonlocal state, first_loss
            state, metrics = step(state, *batch, *depths)
            first_loss = metrics.loss if first_loss is None else first_loss
            return metrics.loss
    else:
        params = jax.jit(lambda: cast_params(init_params(config), config.model.dtype))()
        gradient = jax.jit(make_gradient(config))
        first_loss = None

        def run():
            nonlocal first_loss
            numbers = (np.array([number], np.int32) for number in (options.n, options.k, 0))
            gradients, outputs, _ = gradient(params, *(part[None] for part in batch), *numbers)
            first_loss = outputs.loss[0]
            return gradients

    seconds = median_seconds(run, options.repeats)
    assert first_loss is not None
    return {"seconds": seconds, "loss": float(first_loss), "peak_gb": peak_gigabytes()}


def run_torch(config: Config, rows: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import torch_reference
    from jax_huginn.interop.model_config import model_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.model.dtype)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = torch_reference.MoEHuginnModel(
            torch_reference.MoEHuginnConfig.from_model_config(model_config(config)), seed=0
        )
    master = getattr(torch, config.model.param_dtype if options.optimizer else config.model.dtype)
    model = model.to(device, master)
    for name in ("prelude", "core_block", "coda"):
        for block in model.transformer[name].children():
            block.compile()
    model.unembed = torch.compile(model.unembed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda") if options.optimizer else None
    tokens, labels = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (rows[:, :-1], rows[:, 1:]))
    state = torch.randn(*tokens.shape, config.model.width, device=device, dtype=master) * 0.4**0.5
    first_loss = None

    def step() -> None:
        nonlocal first_loss
        with torch.autocast(device, dtype, enabled=master != dtype):
            output = model(tokens, (options.n, options.k), state, labels)
        output.loss.backward()
        if optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
        first_loss = output.loss.item() if first_loss is None else first_loss  # waits for the device
        model.zero_grad(set_to_none=True)

    times = []
    for _ in range(2 + options.repeats):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {
        "seconds": statistics.median(times[2:]),
        "loss": first_loss,
        "peak_gb": peak,
        "version": torch.__version__,
    }


if __name__ == "__main__":
    run_verb(main)
