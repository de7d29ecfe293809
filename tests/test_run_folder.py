"""The run folder and its logs: one run a folder, every record once."""

import dataclasses
import json
import sys
import types

import pytest

from jax_huginn.checkpoints.run_folder import open_run_folder
from jax_huginn.config.checks import ConfigError
from jax_huginn.reporting.writers import JsonLines, TensorBoard, WandB


def test_a_run_may_be_extended_and_logged_otherwise(make_config, tmp_path):
    config = dataclasses.replace(make_config(), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    longer = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=99),
        log=dataclasses.replace(config.log, every=3),
        checkpoint=dataclasses.replace(config.checkpoint, every=7, keep=9),
    )
    open_run_folder(longer)
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["steps"] == 99


def test_a_run_may_change_its_mesh_unless_tokens_are_dropped(make_config, tmp_path):
    config = dataclasses.replace(make_config(parallel={"data": 8}), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    open_run_folder(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=1, fsdp=8)))
    dropping = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dispatch="all_to_all"))
    with pytest.raises(ConfigError, match=r"parallel.dispatch was 'ring', now 'all_to_all'"):
        open_run_folder(dropping)


def test_another_config_is_refused_and_named(make_config, tmp_path):
    config = dataclasses.replace(make_config(), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    before = (tmp_path / "run/config.json").read_text()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate was 0.0005, now 0.5"):
        open_run_folder(other)
    assert (tmp_path / "run/config.json").read_text() == before


def test_a_new_recipe_resumes_when_it_is_accepted(make_config, tmp_path):
    config = make_config(train={"steps": 20})
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    open_run_folder(config)
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-5)
    changed = dataclasses.replace(config, optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was .*--checkpoint\.accept_changes true"):
        open_run_folder(changed)
    accepting = dataclasses.replace(changed, checkpoint=dataclasses.replace(config.checkpoint, accept_changes=True))
    lines = []
    open_run_folder(accepting, lines.append)
    assert lines == [
        f"checkpoint.accept_changes: optimizer.learning_rate was {config.optimizer.learning_rate}, now 1e-05"
    ]
    other = dataclasses.replace(accepting, optimizer=dataclasses.replace(optimizer, name="muon"))
    with pytest.raises(ConfigError, match=r"optimizer\.name was 'adamw', now 'muon'\): name another"):
        open_run_folder(other)


def test_a_start_that_failed_does_not_bind_the_folder(make_config, tmp_path):
    """The same command with the right path starts; what was deleted is named, and what is not the run's own stays."""
    config = dataclasses.replace(make_config(data={"path": "wrong"}), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run/tokenizer").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    said: list[str] = []
    open_run_folder(dataclasses.replace(config, data=dataclasses.replace(config.data, path="right")), said.append)
    (line,) = said
    assert "data.path was 'wrong', now 'right'" in line
    assert line.endswith("deleted tokenizer, config.json")
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["path"] == "right"
    assert not (tmp_path / "run/tokenizer").exists()
    assert (tmp_path / "run/notes.txt").exists()


@pytest.mark.parametrize(
    "name", ["checkpoints/base-model/model.bin", "tokenizer/notes.txt", "profile/old.json", "metrics.jsonl",
             "tokenizer/tokenizer.json", "checkpoints/100/model.bin"],
)  # fmt: skip
def test_a_folder_of_others_is_refused_and_left_as_it_is(make_config, tmp_path, name):
    config = dataclasses.replace(make_config(data={"path": "wrong"}), run_dir=str(tmp_path / "run"))
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for path in ("wrong", "right"):
        again = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
        with pytest.raises(ConfigError, match=r"holds .*, which no run wrote there: move it, or name another"):
            open_run_folder(again)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("name", ["checkpoints/base-model/model.bin", "tokenizer/notes.txt", "profile/old.json"])
def test_what_is_put_into_a_run_later_is_not_deleted(make_config, tmp_path, name):
    config = dataclasses.replace(make_config(data={"path": "wrong"}), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ConfigError, match="which no run wrote there"):
        open_run_folder(dataclasses.replace(config, data=dataclasses.replace(config.data, path="right")))
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_checkpoints_are_deleted_only_on_demand(make_config, tmp_path):
    config = dataclasses.replace(make_config(checkpoint={"resume": False}), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--checkpoint\.overwrite true"):
        open_run_folder(config)
    assert (tmp_path / "run/checkpoints/5").exists()
    open_run_folder(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, overwrite=True)))
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_damaged_config_and_an_unwritable_folder_get_one_line(make_config, tmp_path):
    config = dataclasses.replace(make_config(), run_dir=str(tmp_path / "run"))
    open_run_folder(config)
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        open_run_folder(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run_folder(dataclasses.replace(config, run_dir=str(tmp_path / "file/run")))


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    for step in range(1, 6):
        writer.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    JsonLines(path, 3).close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[1]["loss"] == "nan"


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path, 0)
    writer.write({"step": 1, "loss": 2.5, "expert_counts": [1, 2], "router_collapse_warning": True})
    writer.write({"step": 2, "loss": 1.5})
    writer.close()
    writer = TensorBoard(tmp_path, 1)  # resumed from step 1: step 2 is written again
    writer.write({"step": 2, "loss": 1.25})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]
    assert "router/expert_counts" not in events.Tags()["scalars"]


def test_wandb_gets_project_config_and_a_lasting_id(make_config, tmp_path, monkeypatch):
    calls, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config()
    for _ in range(2):
        writer = WandB(config, tmp_path)
        writer.write({"step": 4, "loss": 1.0})
        writer.close()
    assert calls[0]["id"] == calls[1]["id"] != ""
    assert calls[0]["project"] == "moe-huginn"
    assert calls[0]["config"]["model"]["width"] == config.model.width
    assert logged[0] == (4, {"train/loss": 1.0})


def test_wandb_missing_is_one_line(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'jax-huginn\[wandb\]'"):
        WandB(make_config(), tmp_path)
