"""The training loop: restore, step, log, validate, save. With several processes each runs it, and the first writes."""

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_huginn.checkpoints.init_from import adopt_tokenizer, load_into, open_start
from jax_huginn.checkpoints.run_folder import RunLock, open_run_folder
from jax_huginn.checkpoints.save import Checkpoints
from jax_huginn.checkpoints.step_folders import CheckpointError
from jax_huginn.config.dicts import flatten, to_dict
from jax_huginn.config.schema import Config
from jax_huginn.data.pipeline import build_data
from jax_huginn.parallel import processes
from jax_huginn.parallel.mesh import describe as describe_mesh
from jax_huginn.parallel.mesh import make_mesh
from jax_huginn.reporting.alarms import Watch, require_finite
from jax_huginn.reporting.console import Console, describe, next_commands
from jax_huginn.reporting.record import routing_metrics
from jax_huginn.reporting.speed import Clock
from jax_huginn.reporting.trace import Profile
from jax_huginn.reporting.writers import make_writers
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.startup import keep_compiled
from jax_huginn.training.step import StepMetrics, abstract_state, make_state, make_train_step
from jax_huginn.training.stopping import Deadline, Stop, deadline_of
from jax_huginn.training.validation import make_validation

DEPTHS_COMPARED = 128  # steps whose depths the processes compare at once


def train(config: Config) -> None:
    """Train until `train.steps`, going on from the run folder's newest good checkpoint if it has one.

    Raises:
        ConfigError, DataError, CheckpointError, BadNumbersError: what a person has to mend, in one line.
    """
    deadline = deadline_of(config.checkpoint)
    with processes.session(config.parallel), RunLock(Path(config.run_dir)) as lock:
        _train(config, deadline, lock)


def _train(config: Config, deadline: Deadline | None, lock: RunLock) -> None:
    console = Console(config.train.steps, silent=not processes.is_first())
    processes.require_same("the config", processes.shared_fields(flatten(to_dict(config))))
    mesh = make_mesh(config)

    # ---------------------------------------------------------------- run folder, data, checkpoints
    # Before the folder is made: a start that cannot be leaves none behind.
    initial = processes.first_then_others(lambda: open_start(config))
    processes.on_first(lock.acquire)
    processes.on_first(lambda: open_run_folder(config))
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(run_dir, config.checkpoint, console.say)
    start = checkpoints.latest_step() or 0
    processes.require_same(f"the run folder {run_dir}", {"the newest checkpoint": start})
    if start >= config.train.steps:
        console.say(
            f"{run_dir} is finished: it is at step {start} of {config.train.steps}; raise --train.steps to go on"
        )
        return
    if initial and processes.is_first() and (warning := adopt_tokenizer(initial, config, run_dir)):
        console.say(warning)
    # The first makes the tokenizer and says what it skips.
    report = console.say if processes.is_first() else lambda _: None
    place = {"process": jax.process_index(), "processes": jax.process_count()}
    data = processes.first_then_others(lambda: build_data(config, run_dir / "tokenizer", report=report, **place))

    # ---------------------------------------------------------------- state
    keep_compiled(run_dir)
    if start:
        state = checkpoints.restore(abstract_state(config, mesh), data.train)
        start = int(state.step)
        console.say(f"resuming {run_dir} from step {start}")
    else:
        state = make_state(config, mesh)
        if initial:
            state = dataclasses.replace(state, params=load_into(initial, state.params))
            console.say(f"weights of {config.checkpoint.init_from}, fresh optimiser")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = jax.devices()[0]
    console.say(f"{parameters / 1e6:.2f} M parameters on {device.device_kind}, run folder {run_dir}")
    console.say(describe_mesh(mesh))
    train_step = jax.jit(make_train_step(config, mesh), donate_argnums=0)
    validate = make_validation(config, data.validation, data.token_bytes, mesh) if data.validation else None
    writers = make_writers(config, run_dir, start, console.say) if processes.is_first() else []
    profile = Profile(config.profile, run_dir)
    watch = Watch(config, console.say, data.train.locate)
    clock = Clock(config, device.device_kind, mesh.size)
    batches, vote = processes.GlobalBatches(mesh), processes.StopVote(mesh)

    def fetch(
        step: int, metrics: StepMetrics, depths: tuple[np.ndarray, np.ndarray], skipped: dict[str, int]
    ) -> dict[str, Any]:
        """A step's record; waits for the step."""
        host: StepMetrics = jax.device_get(metrics)
        n, k = (float(depth.mean()) for depth in depths)
        record: dict[str, Any] = {"step": step, "loss": float(host.loss), "objective": float(host.objective)}
        record |= {"n": n, "k": k, "grad_norm": float(host.grad_norm), "learning_rate": float(host.learning_rate)}
        record |= {"param_norm": float(host.param_norm), "skipped_updates": int(host.skipped), **skipped}
        if not (host.finite_U.all() and np.isfinite(host.grad_norm)):
            record["non_finite"] = np.flatnonzero(~host.finite_U).tolist()  # the micro-batches
        clock.tick(n, k)
        if is_logged(step):
            record |= clock.read()
            record |= {name: float(value) for name, value in host.recurrence.items()}
            record |= {} if host.moe is None else routing_metrics(host.moe)
        return record

    def is_logged(step: int) -> bool:
        return step % config.log.every == 0 or step == config.train.steps

    def send(record: dict[str, Any]) -> None:
        for writer in writers:
            writer.write(record)
        console.progress(record, clock.seconds_per_step, is_logged(record["step"]))
        watch.see(record, checkpoints.latest_step)

    # ---------------------------------------------------------------- steps
    pending, stopped_by = None, None
    with Stop(deadline, vote.agree) as stop, ExitStack() as closed:
        for each in (*writers, checkpoints, data.train, profile):
            closed.enter_context(closing(each))
        for step in range(start, config.train.steps):
            if (step - start) % DEPTHS_COMPARED == 0:
                _compare_depths(config, step)
            batch = batches.place(next(data.train))
            depths = _depths(config, step)
            profile.before(step + 1, state)
            state, metrics = train_step(state, batch["tokens"], batch["labels"], *depths)
            if profile.after(step + 1, metrics):
                console.say(
                    f"steps {config.profile.steps} are traced in {profile.folder}: tensorboard --logdir {run_dir}"
                )
            # The metrics of the step before: fetching this step's would leave the device idle until the next dispatch.
            if pending:
                send(fetch(*pending))
            pending = (step + 1, metrics, depths, data.train.skipped)

            done = step + 1
            stopped_by = stop.requested()  # asked once: a signal may come between two looks
            stopping = stopped_by is not None
            last = done == config.train.steps
            saving = last or stopping or _is_due(done, config.checkpoint.every)
            validating = not stopping and (last or _is_due(done, config.validation.every))
            if saving or validating:
                record, pending = fetch(*pending), None
                clock.pause()
                losses = validate(state.params) if validate and validating else {}
                send(record | losses)
                if losses:
                    console.say(f"step {done}  held out: {describe(losses)}")
                if saving:  # last, so that a checkpoint never lacks the records before it
                    require_finite(record, checkpoints.latest_step)
                    for writer in writers:
                        writer.flush()
                    checkpoints.save(state, data.train, config)
                clock.resume()
            if stopping:
                break

    # ---------------------------------------------------------------- end
    done, saved = int(state.step), checkpoints.latest_step()
    if saved != done:
        again = "from its beginning" if saved is None else f"from step {saved}"
        raise CheckpointError(f"step {done} is not saved: mend what hinders it, and the same command goes on {again}")
    if done < config.train.steps:
        console.say(f"stopped by {stopped_by}: saved step {done}; the same command goes on from there")
        return
    console.say(f"finished {config.train.steps} steps in {run_dir}")
    console.say("\n".join(["next:", *(f"  {command}" for command in next_commands(run_dir, config))]))


def _compare_depths(config: Config, step: int) -> None:
    """Before they run, the depths of the next steps on all processes: other ones would make a collective wait for ever.

    They differ where the processes' NumPy draws differently from the same seed.
    """
    if jax.process_count() > 1:
        depths = {
            f"(n, k) of step {index + 1}": [each.tolist() for each in _depths(config, index)]
            for index in range(step, min(step + DEPTHS_COMPARED, config.train.steps))
        }
        processes.require_same("the depths", depths)


def _depths(config: Config, step: int) -> tuple[np.ndarray, np.ndarray]:
    return sample_depths(config.recurrence, config.train.seed, step, config.train.micro_batches)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
