"""Training with several processes: connection, agreement, shared batches and a common end.

Every process runs the same program on its own devices. Whatever they must agree on (config, depths, when to stop) is
compared or voted on by small exchanges of fixed shape, so that a disagreement is a one-line error and not a deadlock.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jax_huginn.config.checks import ConfigError, UserError
from jax_huginn.config.schema import ParallelConfig
from jax_huginn.parallel.mesh import BATCH, REPLICATED, available_devices, from_every_host

T = TypeVar("T")
CONNECT_SECONDS = 120  # for all processes to find each other
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_OWN_FIELDS = {"coordinator", "process_id", "process_count"}


class ProcessError(UserError):
    """Another process, or the connection to it, failed; one line."""


# ---- Start and end --------------------------------------------------------------------------------------------------


@contextmanager
def session(config: ParallelConfig) -> Iterator[None]:
    """Connect the run's processes and end them together.

    A process that fails prints the reason and exits at once, without waiting at JAX's shutdown barrier. The others
    notice within `parallel.heartbeat_seconds` and exit too.
    """
    initialize(config)
    available_devices()
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            print(f"error: {who}: {error}", file=sys.stderr)
        elif failed_in_xla(error) and not isinstance(error.__cause__, ConfigError):
            reason = str(error).strip().splitlines()[0][:300]
            print(f"error: {who}: another process ended or the network failed ({reason}); rerun the same command "
                  "to resume from the last checkpoint", file=sys.stderr)  # fmt: skip
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def failed_in_xla(error: BaseException) -> bool:
    """Whether XLA failed while it ran a program, as when a collective loses its partner.

    A compiled function that was called before raises such an error as a `ValueError` that begins with XLA's status,
    for example `UNKNOWN: `.
    """
    status = re.match("[A-Z_]{4,}: ", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and status is not None)


def initialize(config: ParallelConfig) -> None:
    """`jax.distributed.initialize` if there are several processes, by the flags or else by the environment of SLURM,
    Open MPI or Kubernetes.

    Raises:
        ConfigError: the other processes cannot be reached.
    """
    arguments = by_flags(config) if config.process_count else by_launcher(config, os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    _wait_for_first(arguments)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            initialization_timeout=CONNECT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(f"the processes of the run cannot be connected: {reason}") from None


def _wait_for_first(arguments: dict[str, Any]) -> None:
    """Wait until process 0 answers, if its address is known: JAX's own client would abort the program.

    Raises:
        ConfigError: it does not answer in time.
    """
    address, process = arguments.get("coordinator_address"), arguments.get("process_id")
    if not address or process is None:
        return
    if process == 0:
        print(f"waiting for {arguments['num_processes'] - 1} other process(es) at {address}", flush=True)
        return
    host, _, port = address.rpartition(":")
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"process 0 does not answer at parallel.coordinator={address} ({error.strerror or error}): start "
                    f"it within {CONNECT_SECONDS} s of process {process}, and check the address"
                ) from None
            time.sleep(0.2)


def by_flags(config: ParallelConfig) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` from `parallel.process_count` and its neighbours."""
    if config.process_count == 1:
        return None
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.process_count,
        "process_id": config.process_id,
        "cluster_detection_method": "deactivate",
    }


def by_launcher(config: ParallelConfig, environment: os._Environ | dict[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` under a launcher of several processes; None without one.

    JAX finds the address; the devices of a process are chosen here. A process alone on its host takes all devices. If
    there are several, each takes the device of its local rank, unless the launcher already shows it a single device.
    """
    # An interactive step has fewer tasks than its allocation, whose count is SLURM_NTASKS.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1)))
    if "SLURM_STEP_NODELIST" in environment and tasks > 1:
        method, local = "slurm", environment.get("SLURM_LOCALID", "0")
        on_host = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
        count, process_id = tasks, int(environment["SLURM_PROCID"])
        alone = {part.split("(")[0] for part in on_host.split(",")} == {"1"}
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        method, local = "ompi", environment["OMPI_COMM_WORLD_LOCAL_RANK"]
        count, process_id = int(environment["OMPI_COMM_WORLD_SIZE"]), int(environment["OMPI_COMM_WORLD_RANK"])
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        if not config.coordinator and "OMPI_MCA_orte_hnp_uri" not in environment:  # Open MPI 5
            raise ConfigError(
                "this version of Open MPI does not provide its host's address: set --parallel.coordinator HOST:PORT"
            )
    elif "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        try:
            import kubernetes  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "an indexed Kubernetes job needs the package kubernetes to find its other pods, or the flags "
                "--parallel.coordinator, process_count and process_id; --parallel.process_count 1 for a job of one"
            ) from None
        return {"cluster_detection_method": "k8s", "local_device_ids": []}
    else:
        return None
    single = any(len(environment[name].split(",")) == 1 for name in _VISIBLE if environment.get(name))
    devices = [] if alone or single else [int(local)]  # an empty list means all visible devices
    if config.coordinator:
        known = {"coordinator_address": config.coordinator, "num_processes": count, "process_id": process_id}
        return {**known, "local_device_ids": devices, "cluster_detection_method": "deactivate"}
    return {"cluster_detection_method": method, "local_device_ids": devices}


def is_first() -> bool:
    """Whether this process writes and logs."""
    return jax.process_index() == 0


# ---- Agreement ------------------------------------------------------------------------------------------------------


def first_then_others(function: Callable[[], T]) -> T:
    """Run `function` on process 0, then on the others; a user's mistake on one process ends all of them."""
    result = None
    for first in (True, False):
        problem = ""
        if is_first() == first:
            try:
                result = function()
            except UserError as error:
                if jax.process_count() == 1:
                    raise
                problem = str(error)
        problems = [text for text in gather_text(problem) if text]
        if problems:
            raise ProcessError(problems[0])
    return result  # pyright: ignore[reportReturnType]


def on_first(function: Callable[[], Any]) -> None:
    """Run `function` on process 0 only; the others wait, and fail if it fails."""
    first_then_others(lambda: function() if is_first() else None)


def of_first(value: int) -> int:
    """The value of process 0, the only one to read and change files."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def gather_text(text: str) -> list[str]:
    """The texts of all processes, in order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([data.size]))).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def require_same(what: str, values: dict[str, Any]) -> None:
    """Raise on every process if the values of one differ from those of process 0.

    Raises:
        ConfigError: the first name that differs, with both values.
    """
    texts = gather_text(json.dumps(values, sort_keys=True))
    for process, text in enumerate(texts):
        if text == texts[0]:
            continue
        ours, theirs = json.loads(texts[0]), json.loads(text)
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"{what} must be the same on every process: {name} is {ours.get(name)!r} on process 0, "
            f"{theirs.get(name)!r} on process {process}"
        )


def shared_fields(flat_config: dict[str, Any]) -> dict[str, Any]:
    """A flat config without the fields in which processes differ."""
    return {name: value for name, value in flat_config.items() if name.removeprefix("parallel.") not in _OWN_FIELDS}


class StopVote:
    """Agreement of all processes on the step after which they stop.

    A vote is an all-reduce of one integer per device. It is dispatched like a step and read one call later, when it has
    long been complete, so no step waits for it and every process reads the same vote at the same step.
    """

    OTHER = 1000  # above all signals

    def __init__(self, mesh: Mesh):
        self.sharding = NamedSharding(mesh, BATCH)
        self.local = np.zeros(mesh.size, np.int32)
        self.highest = jax.jit(lambda votes: votes.max(), out_shardings=NamedSharding(mesh, REPLICATED))
        self.cast: jax.Array | None = None

    def agree(self, reason: str | None) -> str | None:
        """The reason to stop after this step, a signal's name or words, if any process had one at the previous call."""
        if jax.process_count() == 1:
            return reason
        self.local[:] = 0 if reason is None else getattr(signal.Signals, reason, self.OTHER)
        previous, self.cast = self.cast, self.highest(from_every_host(self.local.copy(), self.sharding))
        number = 0 if previous is None else int(previous)
        return None if number == 0 else "the job's end" if number == self.OTHER else signal.Signals(number).name


# ---- Batches --------------------------------------------------------------------------------------------------------


class GlobalBatches:
    """Assembles the rows of all processes into one batch, whose order does not depend on the number of processes."""

    def __init__(self, mesh: Mesh):
        processes = jax.process_count()
        self.sharding = NamedSharding(mesh, BATCH)

        def in_order(rows_BS: jax.Array) -> jax.Array:
            """Moves row i of process p of P from p * B / P + i to i * P + p."""
            return rows_BS.reshape(processes, -1, rows_BS.shape[1]).swapaxes(0, 1).reshape(rows_BS.shape)

        self.in_order = jax.jit(in_order, out_shardings=self.sharding)

    def place(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global arrays of a batch, given this process's rows p, p + P, p + 2 P, ..."""
        return {name: self._place(rows_BS) for name, rows_BS in local.items()}

    def _place(self, rows_BS: np.ndarray) -> jax.Array:
        # Devices of a process are neighbours in the mesh (`make_mesh`), so its rows are a contiguous part of the batch.
        placed = jax.make_array_from_process_local_data(self.sharding, rows_BS)
        return placed if jax.process_count() == 1 else self.in_order(placed)
