"""What a run says: every metric is known by name, the console may fail, and nothing is claimed that is not known."""

import subprocess
import sys
from pathlib import Path

import pytest

from jax_huginn.reporting.console import Console, next_commands
from jax_huginn.reporting.record import METRICS, in_order, markdown_table, metric_of, tag

ROOT = Path(__file__).parent.parent


def test_the_guide_has_the_table_of_the_metrics():
    assert markdown_table() in (ROOT / "docs/training_guide.md").read_text()


def test_every_name_belongs_to_one_metric():
    for name in ("loss", "val_loss_r4", "val_bpb_r16", "expert_0_token_ratio", "expert_12_importance"):
        assert sum(metric.matches(name) for metric in METRICS) == 1
    assert (tag("loss"), tag("val_loss_r4"), tag("n")) == ("train/loss", "val/val_loss_r4", "recurrence/n")
    for name in ("val_loss_r", "val_loss_rx", "losses", "expert_token_ratio"):
        with pytest.raises(KeyError):
            metric_of(name)


def test_a_record_begins_with_the_step_and_the_loss():
    assert list(in_order({"mfu": 0.5, "k": 1, "loss": 2.0, "step": 3})) == ["step", "loss", "k", "mfu"]
    with pytest.raises(KeyError, match="unheard_of"):
        in_order({"step": 1, "unheard_of": 2})


def test_no_time_left_is_claimed_before_a_step_was_measured(capsys):
    console = Console(100)
    console.progress({"step": 1, "loss": 2.0, "n": 3.0, "k": 1.0}, None)
    console.progress({"step": 2, "loss": 1.5, "n": 3.0, "k": 1.0, "tokens_per_second": 1234.5}, 2.0)
    console.progress({"step": 3, "loss": 1.25, "n": 3.5, "k": 1.0}, 2.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  loss 2.0000  depth 3+1",
        "step 2/100  loss 1.5000  depth 3+1  1,234 tokens/s  0:03:16 left",
        "step 3/100  loss 1.2500  depth 3.5+1  1,234 tokens/s  0:03:14 left",
    ]


def test_a_run_on_other_data_is_not_sent_to_the_tasks_of_the_library(tmp_path, make_config):
    (tmp_path / "tokenizer").mkdir()
    for source, tasks in (("stdlib", "stdlib_continuation,stdlib_perplexity"), ("text", "arc_easy,hellaswag")):
        _, evaluate, _ = next_commands(tmp_path, make_config(data={"source": source, "path": "x"}))
        assert f"--tasks {tasks} --recurrence 6" in evaluate


SPEAK = """
import sys
from jax_huginn.reporting.console import Console
console = Console(10)
for step in range(2000):
    console.say("a line that nobody reads")
    console.say_from_signal("nor this")
print("alive", console.silent, file=sys.stderr)
"""


@pytest.mark.parametrize("output", ["> /dev/full", "| head -n 1 > /dev/null", ">&-", "| true"])
def test_a_console_that_fails_falls_silent(output):
    """A full disk, a reader that left, a closed stream: the program runs to its end with status 0."""
    line = f"set -o pipefail; {sys.executable} -c '{SPEAK}' {output}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "alive True\n")
