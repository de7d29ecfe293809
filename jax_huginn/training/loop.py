"""The training loop: restore, step, report, validate, save. Every process runs it; the first one writes and speaks."""

import dataclasses
import time
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jax_huginn.checkpoints.init_from import adopt_tokenizer, load_into, open_start
from jax_huginn.checkpoints.run_folder import RunLock, open_run_folder
from jax_huginn.checkpoints.save import Checkpoints
from jax_huginn.checkpoints.sources import Source
from jax_huginn.checkpoints.step_folders import CheckpointError
from jax_huginn.config.dicts import flatten, to_dict
from jax_huginn.config.schema import Config
from jax_huginn.data.batches import TrainBatches
from jax_huginn.data.pipeline import build_data
from jax_huginn.parallel import processes
from jax_huginn.parallel.mesh import describe as describe_mesh
from jax_huginn.parallel.mesh import make_mesh, replicated
from jax_huginn.reporting.alarms import BadNumbersError
from jax_huginn.reporting.console import Console, next_commands
from jax_huginn.reporting.reporter import Reporter
from jax_huginn.reporting.trace import Trace
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.startup import keep_compiled
from jax_huginn.training.step import TrainState, abstract_state, jit_train_step, make_state
from jax_huginn.training.stopping import Deadline, Stop, deadline_of
from jax_huginn.training.validation import make_validation

DEPTHS_COMPARED = 128  # steps whose depths the processes compare at once


def train(config: Config) -> None:
    """Train until `train.steps`, resuming from the run folder's newest good checkpoint if it has one.

    Raises:
        UserError: what a person has to fix, in one line.
    """
    deadline = deadline_of(config.checkpoint)
    with processes.session(config.parallel), RunLock(Path(config.run_dir)) as lock:
        _train(config, deadline, lock)


def _train(config: Config, deadline: Deadline | None, lock: RunLock) -> None:
    first = processes.is_first()
    console = Console(config.train.steps, silent=not first)
    processes.require_same("the config", processes.shared_fields(flatten(to_dict(config))))
    mesh = make_mesh(config)

    # ---------------------------------------------------------------- run folder, data
    # Weights are opened before the run folder is made: a start that fails leaves no folder behind.
    start = processes.first_then_others(lambda: open_start(config))
    processes.on_first(lock.acquire)
    processes.on_first(lambda: open_run_folder(config, console.say))
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(run_dir, config.checkpoint, console.say)
    newest = checkpoints.latest_step() or 0
    processes.require_same(f"the run folder {run_dir}", {"the newest checkpoint": newest})
    if newest >= config.train.steps:
        console.say(f"{run_dir} is finished: step {newest} of {config.train.steps}; raise --train.steps to continue")
        return
    if start and first and (warning := adopt_tokenizer(start, config, run_dir)):
        console.say(warning)
    console.say(f"reading data ({config.data.source})")
    place = {"process": jax.process_index(), "processes": jax.process_count()}
    report = console.say if first else lambda _: None
    data = processes.first_then_others(lambda: build_data(config, run_dir / "tokenizer", report=report, **place))

    # ---------------------------------------------------------------- state
    keep_compiled(run_dir)
    state = _initial_state(config, mesh, checkpoints, data.train, start, console)
    processes.on_first(lambda: checkpoints.require_room(state))
    begin = int(state.step)
    device = jax.devices()[0]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    console.say(f"{parameters / 1e6:.2f} M parameters on {device.device_kind}, run folder {run_dir}")
    console.say(describe_mesh(mesh))
    train_step = jit_train_step(config, mesh)
    validate = make_validation(config, data.validation, data.token_bytes, mesh) if data.validation else None
    batches, vote = processes.GlobalBatches(mesh), processes.StopVote(mesh)
    trace = Trace(config.profile, run_dir)
    reporter = Reporter(
        config, console, run_dir, begin,
        first=first, devices=mesh.size, newest=checkpoints.latest_step, locate=data.train.locate,
    )  # fmt: skip

    # ---------------------------------------------------------------- steps
    pending, stopped_by = None, None
    whole = True  # whether `state` and the data's position belong to the same step

    def save(record: dict | None) -> None:
        if record:
            reporter.before_save(record)
        checkpoints.save(state, data.train, config)

    with Stop(deadline, vote.agree, console.say_from_signal) as stop, ExitStack() as closed:
        for each in (reporter, checkpoints, data.train, trace):
            closed.enter_context(closing(each))
        try:
            for step in range(begin, config.train.steps):
                done = step + 1
                if (step - begin) % DEPTHS_COMPARED == 0:
                    _compare_depths(config, step)
                if step == begin:
                    console.say("reading the first rows")
                rows = next(data.train)
                whole = False
                batch = batches.place(rows)
                depths = _depths(config, step)
                placed = [replicated(each, mesh) for each in depths]
                trace.before(done, state)
                if step == begin:
                    console.say("compiling the training step")
                began = time.perf_counter()
                with jax.transfer_guard("disallow"):  # nothing but the batch and the depths travels to the devices
                    state, metrics = train_step(state, batch["tokens"], batch["labels"], *placed)
                whole = True
                if step == begin:
                    console.say(f"compiled in {time.perf_counter() - began:.1f} s")
                if trace.after(done, metrics):
                    console.say(
                        f"steps {config.profile.steps} are traced in {trace.folder}: tensorboard --logdir {run_dir}"
                    )
                # Report the step before: fetching this one's metrics would leave the device idle until the next.
                if pending:
                    reporter.send(reporter.measure(*pending))
                tokens = data.train.position["rows"] * config.train.sequence_length
                pending = (done, metrics, depths, {"tokens": tokens, **data.train.seen, **data.train.skipped})

                stopped_by = stop.requested()  # asked once: a signal may come between two looks
                stopping = stopped_by is not None
                last = done == config.train.steps
                saving = last or stopping or _is_due(done, config.checkpoint.every)
                validating = not stopping and (last or _is_due(done, config.validation.every))
                if saving or validating:
                    record, pending = reporter.measure(*pending), None
                    if validate and validating:
                        console.say(f"step {done}  validating")
                    with reporter.paused():
                        losses = validate(state.params) if validate and validating else {}
                        reporter.send(record | losses)
                        if saving:  # last, so that a checkpoint never lacks the records before it
                            save(record)
                if stopping:
                    break
        except BadNumbersError:
            raise
        except Exception:
            # What failed is not the state: data that vanished, a full disk under a writer. Save before leaving; among
            # several processes the others are in the next step already.
            if whole and jax.process_count() == 1 and int(state.step) > begin:
                if pending:
                    record = reporter.measure(*pending)
                    reporter.send(record)
                    save(record)
                else:
                    save(None)
            raise

    # ---------------------------------------------------------------- end
    done, saved = int(state.step), checkpoints.latest_step()
    if saved != done:
        again = "from the beginning" if saved is None else f"from step {saved}"
        raise CheckpointError(f"step {done} was not saved; fix the cause and rerun the same command to resume {again}")
    if done < config.train.steps:
        console.say(f"stopped by {stopped_by}: saved step {done}; rerun the same command to resume")
        return
    console.say(f"finished {config.train.steps} steps in {run_dir}")
    console.say("\n".join(["next:", *(f"  {command}" for command in next_commands(run_dir, config))]))


def _initial_state(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, batches: TrainBatches, start: Source | None, console: Console
) -> TrainState:
    """The state to train from, the first of these that there is:

    1. the run's own newest good checkpoint, with its optimiser and its position in the data;
    2. the weights of `checkpoint.init_from`, with a fresh optimiser, at step 0;
    3. fresh weights from `train.seed`, at step 0.
    """
    if newest := checkpoints.latest_step():
        console.say(f"reading the checkpoint of step {newest}")
        state = checkpoints.restore(abstract_state(config, mesh), batches)
        console.say(f"resuming {config.run_dir} from step {int(state.step)}")
        return state
    console.say("making the initial state")
    state = make_state(config, mesh)
    if start:
        state = dataclasses.replace(state, params=load_into(start, state.params))
        console.say(f"weights of {config.checkpoint.init_from}, fresh optimiser")
    return state


def _compare_depths(config: Config, step: int) -> None:
    """Check ahead of time that all processes drew the same depths; a mismatch would deadlock a collective.

    They differ if the processes' versions of NumPy draw differently from the same seed.
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
