"""What a person sees while training runs."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from jax_huginn.config.schema import Config


class Console:
    """A live line on a terminal, a line per logged step elsewhere, and nothing where `silent`."""

    def __init__(self, steps: int, silent: bool = False):
        self.steps, self.silent = steps, silent
        self.live = sys.stdout.isatty()
        self.unfinished = False
        self.speed = ""  # the last one that was measured; most records have none

    def progress(self, record: dict[str, Any], seconds_per_step: float, logged: bool) -> None:
        """Show a step; off a terminal only the logged ones."""
        if self.silent or not (self.live or logged):
            return
        step = record["step"]
        left = timedelta(seconds=round(max(self.steps - step, 0) * seconds_per_step))
        line = f"step {step}/{self.steps}  loss {record['loss']:.4f}  depth {record['n']:g}+{record['k']:g}"
        if "tokens_per_second" in record:
            self.speed = f"  {record['tokens_per_second']:,.0f} tokens/s"
        line += f"{self.speed}  {left} left"
        if self.live:
            print(f"\r\x1b[K{line}", end="", flush=True)
            self.unfinished = True
        else:
            print(line, flush=True)

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if self.silent:
            return
        print(("\n" if self.unfinished else "") + text, flush=True)
        self.unfinished = False


def describe(losses: dict[str, float]) -> str:
    """'r=1 3.21 nats (1.54 bits/byte), r=4 ...'."""
    parts = []
    for name, value in losses.items():
        if name.startswith("val_loss_r"):
            depth = name.removeprefix("val_loss_r")
            per_byte = losses.get(f"val_bpb_r{depth}")
            parts.append(f"r={depth} {value:.4f} nats" + (f" ({per_byte:.4f} bits/byte)" if per_byte else ""))
    return ", ".join(parts)


def next_commands(run_dir: Path, config: Config) -> list[str]:
    """What a newcomer does with a finished run."""
    evaluate = (
        f"python torch_reference/quick_checkpoint_eval.py --checkpoint_name {run_dir}/model.pth "
        f"--tokenizer_path {run_dir}/tokenizer --tasks stdlib_continuation,stdlib_perplexity "
        f"--recurrence {config.recurrence.mean}"
    )
    export = f"python -m jax_huginn.export {run_dir} --out {run_dir}/model.pth"
    return [export, evaluate] + [f"tensorboard --logdir {run_dir}"] * config.log.tensorboard
