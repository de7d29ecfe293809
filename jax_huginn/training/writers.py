"""Where records go: metrics.jsonl, TensorBoard, Weights & Biases."""

# The messages of TensorBoard's protocol buffers are made at import time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import json
import math
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from jax_huginn.config.schema import Config, ConfigError, to_dict

Record = dict[str, Any]


class Writer(Protocol):
    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


def make_writers(config: Config, run_dir: Path, restored_step: int) -> list[Writer]:
    """All writers that the config asks for, in a state that follows `restored_step`."""
    writers: list[Writer] = [JsonLines(run_dir / "metrics.jsonl", restored_step)]
    if config.log.tensorboard:
        writers.append(TensorBoard(run_dir / "tensorboard", restored_step))
    if config.log.wandb:
        writers.append(WandB(config, run_dir))
    return writers


class JsonLines:
    """One JSON object a record. On resume, records after the restored step are cut off, so that no step is twice."""

    def __init__(self, path: Path, restored_step: int):
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= restored_step]
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(line + "\n" for line in kept))
            replacement.replace(path)
        self.file = path.open("a")

    def write(self, record: Record) -> None:
        finite = {key: value if _is_finite(value) else str(value) for key, value in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars as TensorBoard events, through TensorBoard's own writer: no TensorFlow, no torch."""

    def __init__(self, folder: Path, restored_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))
        # Tells TensorBoard to drop what an earlier, interrupted session wrote after the restored step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(event_pb2.Event(session_log=start, step=restored_step + 1, wall_time=time.time()))

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        values = [
            summary_pb2.Summary.Value(tag=key, simple_value=float(value))
            for key, value in record.items()
            if key != "step" and isinstance(value, (bool, int, float))
        ]
        summary = summary_pb2.Summary(value=values)
        self.writer.add_event(event_pb2.Event(summary=summary, step=record["step"], wall_time=time.time()))

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; a resumed run continues under the same id."""

    def __init__(self, config: Config, run_dir: Path):
        try:
            import wandb
        except ImportError:
            raise ConfigError("log.wandb=true needs wandb: pip install 'jax-huginn[wandb]'") from None
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        self.run = wandb.init(
            project=config.log.wandb_project,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            name=run_dir.name,
            config=to_dict(config),
        )

    def write(self, record: Record) -> None:
        self.run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _step_of(line: str) -> float:
    """The step of a record; a line cut short by a crash counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
