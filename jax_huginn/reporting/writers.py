"""Where records go: metrics.jsonl, TensorBoard, Weights & Biases."""

# The messages of TensorBoard's protocol buffers are made at import time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.dicts import to_dict
from jax_huginn.config.schema import Config
from jax_huginn.files import whole_file
from jax_huginn.reporting.record import Record, tag

Say = Callable[[str], None]


class Writer(Protocol):
    """Takes records in the order of their steps. A failure costs a line, never the run."""

    def write(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Put what was written where no crash can reach it; called before a checkpoint is made."""
        ...

    def close(self) -> None: ...


def make_writers(config: Config, run_dir: Path, restored_step: int, say: Say = print) -> list[Writer]:
    """All writers that the config asks for, in a state that follows `restored_step`.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    try:
        writers: list[Writer] = [JsonLines(run_dir / "metrics.jsonl", restored_step, say)]
        if config.log.tensorboard:
            writers.append(TensorBoard(run_dir / "tensorboard", restored_step, say))
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from None
    if config.log.wandb:
        writers.append(WandB(config, run_dir, say))
    return writers


class JsonLines:
    """One JSON object a record. On resume, records after the restored step are cut off, so that no step is twice.

    What a full disk does not take is held in memory, up to the byte, and written once there is room.
    """

    def __init__(self, path: Path, restored_step: int, say: Say = print):
        if path.exists():
            # Bytes: a damaged line may be no UTF-8, and is dropped like any other that is no record.
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= restored_step]
            with whole_file(path) as unfinished:
                unfinished.write_bytes(b"".join(line + b"\n" for line in kept))
        self.file, self.say = path.open("ab", buffering=0), say
        self.unwritten, self.failing = b"", False

    def write(self, record: Record) -> None:
        finite = {key: value if _is_finite(value) else str(value) for key, value in record.items()}
        self.unwritten += json.dumps(finite).encode() + b"\n"
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.failing = False
        except OSError as error:
            if not self.failing:
                self.say(f"warning: {self.file.name} cannot be written ({error.strerror}): records wait in memory")
            self.failing = True

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.unwritten:
            self.say(f"error: {self.file.name} lacks its last {self.unwritten.count(10)} record(s): no room for them")
        self.file.close()


class TensorBoard:
    """Scalars as TensorBoard events, through TensorBoard's own writer: no TensorFlow, no torch."""

    def __init__(self, folder: Path, restored_step: int, say: Say = print):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.say, self.failed = say, False
        self.writer = EventFileWriter(str(folder))
        # Makes TensorBoard drop what an earlier, interrupted session wrote after the restored step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(event_pb2.Event(session_log=start, step=restored_step + 1, wall_time=time.time()))

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        values = [
            summary_pb2.Summary.Value(tag=tag(key), simple_value=float(value))
            for key, value in record.items()
            if key != "step" and isinstance(value, (bool, int, float))
        ]
        summary = summary_pb2.Summary(value=values)
        event = event_pb2.Event(summary=summary, step=record["step"], wall_time=time.time())
        self._try(lambda: self.writer.add_event(event))

    def flush(self) -> None:
        self._try(self.writer.flush)

    def close(self) -> None:
        self._try(self.writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        """Its thread reports a failure at some later call, and is of no use then."""
        if self.failed:
            return
        try:
            action()
        except OSError as error:
            self.failed = True
            self.say(f"warning: TensorBoard gets no more records of this session ({error.strerror or error})")


class WandB:
    """Weights & Biases; a resumed run continues under the same id. What fails there costs a line, never the run."""

    def __init__(self, config: Config, run_dir: Path, say: Say = print):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("log.wandb=true needs wandb: pip install 'jax-huginn[wandb]'") from None
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        self.say, self.failed = say, False
        self.run: Any = None
        self._try(lambda: self._begin(wandb, config, run_dir, run_id))

    def _begin(self, wandb: Any, config: Config, run_dir: Path, run_id: str) -> None:
        self.run = wandb.init(
            project=config.log.wandb_project,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            name=run_dir.name,
            config=to_dict(config),
        )

    def write(self, record: Record) -> None:
        values = {tag(key): value for key, value in record.items() if key != "step"}
        self._try(lambda: self.run.log(values, step=record["step"]))

    def flush(self) -> None:
        """Nothing to do: W&B sends in a process of its own."""

    def close(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, action: Callable[[], Any]) -> None:
        """Run an action of wandb's, unless one has failed; its errors are of many types, some of its server."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            self.say(
                f"warning: Weights & Biases gets no records of this session ({reason}): run `wandb login`, or set "
                "WANDB_MODE=offline and sync later"
            )


def _step_of(line: bytes) -> float:
    """The step of a record; a line cut short by a crash counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
