"""The training loop: restore, step, log, validate, save."""

import time
from typing import Any

import jax
import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.data.pipeline import build_data
from jax_huginn.training.checkpoint import Checkpoints
from jax_huginn.training.console import Console
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.flops import peak_flops, training_flops
from jax_huginn.training.metrics import routing_metrics
from jax_huginn.training.run_folder import open_run_folder
from jax_huginn.training.step import StepMetrics, init_state, make_train_step
from jax_huginn.training.stopping import StopSignal
from jax_huginn.training.validation import make_validation
from jax_huginn.training.writers import make_writers


def train(config: Config) -> None:
    """Train until `train.steps`, going on from the run folder's newest checkpoint if it has one.

    Raises:
        ConfigError, DataError, CheckpointError: a user's mistake, in one line.
    """
    console = Console(config.train.steps)

    # ---------------------------------------------------------------- run folder, data, checkpoints
    run_dir = open_run_folder(config)
    checkpoints = Checkpoints(run_dir, config.checkpoint)
    start = checkpoints.latest_step() or 0
    if start >= config.train.steps:
        console.say(
            f"{run_dir} is finished: it is at step {start} of {config.train.steps}; raise --train.steps to go on"
        )
        return
    data = build_data(config, run_dir / "tokenizer")

    # ---------------------------------------------------------------- state
    if start:
        state = checkpoints.restore(start, data.train, config)
        console.say(f"resuming {run_dir} from step {start}")
    else:
        state = jax.jit(lambda: init_state(config))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = jax.devices()[0]
    console.say(f"{parameters / 1e6:.2f} M parameters on {device.device_kind}, run folder {run_dir}")
    train_step = jax.jit(make_train_step(config), donate_argnums=0)
    validate = make_validation(config, data.validation, data.token_bytes) if data.validation else None
    writers = make_writers(config, run_dir, start)
    clock = Clock(config, device.device_kind)

    def fetch(step: int, metrics: StepMetrics, depths: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """A step's record; waits for the step."""
        host: StepMetrics = jax.device_get(metrics)
        n, k = (float(depth.mean()) for depth in depths)
        record: dict[str, Any] = {"step": step, "loss": float(host.loss), "objective": float(host.objective)}
        record |= {"n": n, "k": k, "grad_norm": float(host.grad_norm), "learning_rate": float(host.learning_rate)}
        clock.tick(n, k)
        if is_logged(step):
            record |= {"param_norm": float(host.param_norm), **clock.read()}
            record |= {name: float(value) for name, value in host.recurrence.items()}
            record |= {} if host.moe is None else routing_metrics(host.moe)
        return record

    def is_logged(step: int) -> bool:
        return step % config.log.every == 0 or step == config.train.steps

    def send(record: dict[str, Any]) -> None:
        for writer in writers:
            writer.write(record)
        console.progress(record, clock.seconds_per_step, is_logged(record["step"]))

    # ---------------------------------------------------------------- steps
    losses: dict[str, float] = {}
    pending = None
    with StopSignal() as stop:
        for step in range(start, config.train.steps):
            batch = next(data.train)
            depths = sample_depths(config.recurrence, config.train.seed, step, config.train.micro_batches)
            state, metrics = train_step(state, batch["tokens"], batch["labels"], *depths)
            # The metrics of the step before: fetching this step's would leave the device idle until the next dispatch.
            if pending:
                send(fetch(*pending))
            pending = (step + 1, metrics, depths)

            done = step + 1
            last = done == config.train.steps or stop.received is not None
            validating = validate and (done == config.train.steps or _is_due(done, config.validation.every))
            if last or validating or _is_due(done, config.checkpoint.every):
                record, pending = fetch(*pending), None
                clock.pause()
                if last or _is_due(done, config.checkpoint.every):
                    checkpoints.save(state, data.train, config)
                if validating and validate and not stop.received:
                    losses = validate(state.params)
                    record |= losses
                clock.resume()
                send(record)
                if validating and losses:
                    console.say(f"step {done}  held out: {describe(losses)}")
            if stop.received:
                break

    # ---------------------------------------------------------------- end
    checkpoints.wait()
    checkpoints.close()
    for writer in writers:
        writer.close()
    if stop.received:
        console.say(f"stopped by {stop.received}: saved step {int(state.step)}; the same command goes on from there")
        return
    console.say(f"finished {config.train.steps} steps in {run_dir}")
    console.say("\n".join(["next:", *(f"  {command}" for command in next_commands(run_dir, config))]))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Clock:
    """Speed of the steps between two readings; validation and saving are paused out, and so is the first step,
    which compiles."""

    def __init__(self, config: Config, device_kind: str):
        self.config, self.peak = config, peak_flops(device_kind)
        self.tokens = config.train.batch_size * config.train.sequence_length
        self.last: float | None = None
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        self.seconds_per_step = 0.0

    def tick(self, n: float, k: float) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.steps += 1
            self.seconds += now - self.last
            self.flops += self.tokens * training_flops(self.config, n, k)
            self.seconds_per_step = self.seconds / self.steps
        self.last = now

    def read(self) -> dict[str, float]:
        """Tokens/s, TFLOP/s and, on a known device, MFU since the last reading."""
        if not self.steps:
            return {}
        record = {
            "tokens_per_second": self.steps * self.tokens / self.seconds,
            "tflops_per_second": self.flops / self.seconds / 1e12,
        }
        if self.peak:
            record["mfu"] = self.flops / self.seconds / self.peak
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        return record

    def pause(self) -> None:
        self.last = None

    def resume(self) -> None:
        self.last = time.perf_counter()


def describe(losses: dict[str, float]) -> str:
    """'r=1 3.21 nats (1.54 bits/byte), r=4 ...'."""
    parts = []
    for name, value in losses.items():
        if name.startswith("val_loss_r"):
            depth = name.removeprefix("val_loss_r")
            per_byte = losses.get(f"val_bpb_r{depth}")
            parts.append(f"r={depth} {value:.4f} nats" + (f" ({per_byte:.4f} bits/byte)" if per_byte else ""))
    return ", ".join(parts)


def next_commands(run_dir: Any, config: Config) -> list[str]:
    """What a newcomer does with a finished run."""
    evaluate = (
        f"python torch_reference/quick_checkpoint_eval.py --checkpoint_name {run_dir}/model.pth "
        f"--tokenizer_path {run_dir}/tokenizer --tasks stdlib_continuation,stdlib_perplexity "
        f"--recurrence {config.recurrence.mean}"
    )
    export = f"python -m jax_huginn.export {run_dir} --out {run_dir}/model.pth"
    return [export, evaluate] + [f"tensorboard --logdir {run_dir}"] * config.log.tensorboard
