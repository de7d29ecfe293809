"""What a person sees while training runs."""

import os
import re
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from jax_huginn.config.schema import Config
from jax_huginn.reporting.record import Record

COLUMNS = 13  # groups of a table of accuracy
GROUPS_SHOWN = {1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32}  # where there are more


class Console:
    """A live line on a terminal, a line per logged step elsewhere, and nothing where `silent`.

    Standard output that fails (a full disk, a closed pipe, a lost terminal) makes it silent; the run continues.
    """

    def __init__(self, steps: int, silent: bool = False):
        self.steps, self.silent = steps, silent or sys.stdout is None
        self.live = not self.silent and os.isatty(1)
        self.unfinished = False
        self.speed = ""  # the last one that was measured; most records have none

    def progress(self, record: Record, seconds_per_step: float | None) -> None:
        """Show a step; the time left once a step was measured."""
        step = record["step"]
        line = f"step {step}/{self.steps}  loss {record['loss']:.4f}  depth {record['n']:g}+{record['k']:g}"
        if "tokens_per_second" in record:
            self.speed = f"  {record['tokens_per_second']:,.0f} tokens/s"
        line += self.speed
        if seconds_per_step is not None:
            line += f"  {timedelta(seconds=round(max(self.steps - step, 0) * seconds_per_step))} left"
        if self.live:
            self._write(f"\r\x1b[K{line}")
            self.unfinished = True
        else:
            self._write(line + "\n")

    def say(self, text: str = "") -> None:
        """A line that stays."""
        self._write(("\n" if self.unfinished else "") + text + "\n")
        self.unfinished = False

    def say_from_signal(self, text: str) -> None:
        """A line from a signal handler, which must not enter Python's buffered output a second time."""
        if not self.silent:
            try:
                os.write(sys.stdout.fileno(), (("\n" if self.live else "") + text + "\n").encode())
            except (OSError, ValueError):
                self._fail()

    def _write(self, text: str) -> None:
        if self.silent:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except (OSError, ValueError):
            self._fail()

    def _fail(self) -> None:
        """Fall silent. What is left in Python's buffer goes nowhere, or its exit would fail on it."""
        self.silent = True
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass


def describe(losses: Record) -> str:
    """'r=1 3.2100 nats (1.5400 bits/byte), r=4 ...' of a validation's record; with groups also a table of accuracy."""
    parts = []
    for name, nats in losses.items():
        if name.startswith("val_loss_r"):
            depth = name.removeprefix("val_loss_r")
            bits = losses.get(f"val_bpb_r{depth}")
            parts.append(f"r={depth} {nats:.4f} nats" + (f" ({bits:.4f} bits/byte)" if bits else ""))
    return "\n".join([", ".join(parts), *accuracy_table(losses)])


def accuracy_table(record: Record) -> list[str]:
    """Lines of accuracy by depth (rows) and group (columns, some of them where there are many); none without groups."""
    if "val_groups" not in record:
        return []
    groups = record["val_groups"]
    shown = [index for index, group in enumerate(groups) if len(groups) <= COLUMNS or group in GROUPS_SHOWN]
    lines = ["accuracy by recurrences r and group", "   r " + "".join(f"{groups[i]:6d}" for i in shown) + "   all"]
    for name, accuracy in record.items():
        if match := re.fullmatch(r"val_accuracy_r(\d+)_by_group", name):
            cells = "".join(f"{accuracy[i]:6.2f}" for i in shown)
            lines.append(f"{match[1]:>4} {cells}{record[f'val_accuracy_r{match[1]}']:6.2f}")
    return lines


def next_commands(run_dir: Path, config: Config) -> list[str]:
    """What a newcomer does with a finished run; ready to paste."""
    commands = [["python", "-m", "jax_huginn.export", f"{run_dir}", "--out", f"{run_dir}/model.pth"]]
    if config.data.source == "generated":
        depths = ",".join(map(str, config.validation.depths))
        commands.append([
            "python", "-m", "jax_huginn.evaluate", f"{run_dir}", "--tasks", config.data.task, "--recurrence", depths,
        ])  # fmt: skip
    elif (run_dir / "tokenizer").is_dir():
        # The library's own tasks ask about files that only a run on the library has held out.
        own = config.data.source == "stdlib"
        commands.append([
            "python", "torch_reference/quick_checkpoint_eval.py", "--checkpoint_name", f"{run_dir}/model.pth",
            "--tokenizer_path", f"{run_dir}/tokenizer",
            "--tasks", "stdlib_continuation,stdlib_perplexity" if own else "arc_easy,hellaswag",
            "--recurrence", f"{config.recurrence.mean}",
        ])  # fmt: skip
    if config.log.tensorboard:
        commands.append(["tensorboard", "--logdir", f"{run_dir}"])
    return [shlex.join(command) for command in commands]
