"""Training end to end, as a user runs it: in a process of its own, without torch, on a folder of text."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jax_huginn import load_checkpoint
from jax_huginn.checkpoints.load import find_step
from jax_huginn.config.checks import UserError
from jax_huginn.config.schema import Config
from jax_huginn.training import loop
from jax_huginn.training.loop import train
from tests.support import HANGS

ROOT = Path(__file__).parent.parent
PRESET = """
import dataclasses
from configs.moe import get_config as default
from jax_huginn.config.schema import *

def get_config():
    config = default()
    return dataclasses.replace(
        config,
        run_dir={run_dir!r},
        model=dataclasses.replace(
            config.model, vocab_size=320, width=32, heads=2, kv_heads=2, mlp_width=48, max_length=32
        ),
        moe=dataclasses.replace(config.moe, experts=4, width=16),
        recurrence=RecurrenceConfig(mean=3, backprop_depth=2),
        optimizer=OptimizerConfig(warmup_steps=2),  # no cooldown: a longer run is the same run, longer
        train=TrainConfig(steps=8, batch_size=2, sequence_length=32, micro_batches=2),
        data=DataConfig(source="text", path={path!r}, streams=2, shuffle_window=4, validation_fraction=0.3),
        validation=ValidationConfig(every=4, sequences=2, depths=(1, 3)),
        checkpoint=CheckpointConfig(every=4, keep=2),
        log=LogConfig(every=2),
    )
"""
# Run by every Python at its start, from PYTHONPATH: torch looks uninstalled, and training must not need it.
NO_TORCH = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for index in range(8):
        words = random.choice(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"], 600)
        (folder / f"{index}.txt").write_text(" ".join(words))
    return folder


def preset(folder: Path, corpus: Path, name: str = "run") -> Path:
    file = folder / f"{name}.py"
    file.write_text(PRESET.format(run_dir=str(folder / name), path=str(corpus)))
    return file


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    blocked = folder / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "sitecustomize.py").write_text(NO_TORCH)
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
    return [sys.executable, str(ROOT / "train_jax.py"), *arguments], environment


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(folder, *arguments)
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=folder, timeout=HANGS, check=False)


def records_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(run_dir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.as_pure(nnx.split(load_checkpoint(run_dir))[1]))]


TIMES = {"tokens_per_second", "tflops_per_second", "mfu"}


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> tuple[Path, str]:
    """An uninterrupted run of 8 steps: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(folder, "--config", str(preset(folder, corpus)))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_run_leaves_what_it_promises(finished):
    folder, printed = finished
    run_dir = folder / "run"
    records = records_of(run_dir)
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert record["objective"] > record["loss"] > 0
        assert record["k"] >= 1
    for key in ("expert_counts", "rel_residual", "tokens_per_second", "last_hidden_token_corr", "gini_coefficient"):
        assert key in records[-1]
    assert "val_bpb_r3" in records[-1]
    assert "val_loss_r1" in records[3]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "8"]
    assert list((run_dir / "tensorboard").glob("events*"))
    assert json.loads((run_dir / "config.json").read_text())["train"]["steps"] == 8
    for words in ("step 8/8", "tokens/s", "held out: r=1", "python -m jax_huginn.export", "tensorboard --logdir"):
        assert words in printed


def test_the_tokenizer_of_a_run_loads_with_autotokenizer(finished):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "run/tokenizer")
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert 256 + 3 < len(tokenizer) <= 320


def test_a_finished_run_says_so_and_an_interrupted_one_resumes_bit_for_bit(finished, corpus, tmp_path):
    file = preset(tmp_path, corpus)
    short = run(tmp_path, "--config", str(file), "--train.steps", "5")
    assert short.returncode == 0, short.stderr
    again = run(tmp_path, "--config", str(file), "--train.steps", "5")
    assert (again.returncode, "is finished" in again.stdout) == (0, True)
    resumed = run(tmp_path, "--config", str(file))
    assert "resuming" in resumed.stdout, resumed.stderr
    for a, b in zip(weights_of(tmp_path / "run"), weights_of(finished[0] / "run"), strict=True):
        assert np.array_equal(a, b)
    mine, theirs = (without_times(records_of(folder / "run")) for folder in (tmp_path, finished[0]))
    for a, b in zip(mine, theirs, strict=True):
        assert a.items() >= b.items()  # the shorter run validated at its own end, too


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_says_how_to_resume(number, corpus, tmp_path):
    line, environment = command(tmp_path, "--config", str(preset(tmp_path, corpus)), "--train.steps", "100000")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for output in process.stdout:
        if output.startswith("step 4"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, rest
    assert f"stopped by {number.name}: saved step" in rest
    assert "rerun the same command to resume" in rest
    saved = int(find_step(tmp_path / "run").name)
    assert f"saved step {saved};" in rest
    assert records_of(tmp_path / "run")[-1]["step"] == saved >= 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stps", "3"], "did you mean --train.steps?"),
        (["--data.path", "/nothing/there", "--train.steps", "9"], "/nothing/there"),
        (["--optimizer.learning-rate", "1.5"], "belongs to another config"),
        (["--checkpoint.resume", "false"], "--checkpoint.overwrite true"),
    ],
)
def test_mistakes_get_one_line_and_status_2(finished, arguments, words):
    folder, _ = finished
    before = records_of(folder / "run")
    result = run(folder, "--config", str(folder / "run.py"), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert records_of(folder / "run") == before


def test_a_loaded_checkpoint_is_the_trained_model(finished):
    """Its held-out loss is the one that the run reported."""
    from jax_huginn.data.pipeline import build_data

    model = load_checkpoint(finished[0] / "run")
    data = build_data(model.config, finished[0] / "run/tokenizer")
    assert len(data.validation) == 2  # validation.sequences, a micro-batch at a time
    losses = [float(model(batch["tokens"], (3, 0), labels=batch["labels"]).log_ppl) for batch in data.validation]
    assert np.mean(losses) == pytest.approx(records_of(finished[0] / "run")[-1]["val_loss_r3"], rel=1e-5)
    step_4 = load_checkpoint(finished[0] / "run/checkpoints/4")
    assert not np.array_equal(step_4.wte[...], model.wte[...])


def test_missing_checkpoints_are_said(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*none: give a run folder"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no config\.json there, so neither a run nor a Hugging Face folder"):
        load_checkpoint(tmp_path / "empty")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint in .*run: train first"):
        load_checkpoint(tmp_path / "run")


def small_dense(make_config, corpus: Path, run_dir: Path) -> Config:
    """Nothing held out, no experts, two steps."""
    config = make_config(
        model={"vocab_size": 300, "max_length": 32, "core_layers": 1, "prelude_layers": 0, "coda_layers": 0},
        moe={"experts": 0},
        train={"steps": 2, "batch_size": 2, "sequence_length": 32},
        data={"source": "text", "path": str(corpus), "validation_fraction": 0.0, "streams": 2, "shuffle_window": 2},
        log={"tensorboard": False},
    )
    return dataclasses.replace(config, run_dir=str(run_dir))


def test_training_runs_in_process_without_validation(corpus, tmp_path, make_config):
    """The function behind the command."""
    train(small_dense(make_config, corpus, tmp_path / "run"))
    assert len(records_of(tmp_path / "run")) == 2


def test_a_hidden_transfer_in_a_step_is_an_error(corpus, tmp_path, make_config, monkeypatch):
    """The host's values reach the devices before the step: one given to it as it is would make every step wait."""
    monkeypatch.setattr(loop, "replicated", lambda value, mesh: value)
    monkeypatch.setattr(loop, "jit_train_step", lambda *of: jax.jit(lambda state, *inputs: (state, inputs)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(small_dense(make_config, corpus, tmp_path / "run"))
