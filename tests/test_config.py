"""Configuration: presets, overrides, and one line for every mistake."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_huginn import MoEHuginnConfig700M, MoEHuginnModel
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.cli import parse_config, run_verb
from jax_huginn.config.compatibility import (
    MAY_BE_ACCEPTED,
    MAY_CHANGE_FIELDS,
    changes,
    describe_may_change,
    differences_of_model,
)
from jax_huginn.config.dicts import flatten, from_dict, to_dict
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config, MoEConfig
from jax_huginn.model.huginn import abstract_model
from jax_huginn.training.step import init_state

ROOT = Path(__file__).parent.parent
MOE = str(ROOT / "configs/moe.py")


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("moe_700m", 709_480_448), ("moe_3_8b", 3_820_491_840), ("huginn_3_5b", 3_564_976_800)],
)
def test_large_presets_have_the_designed_size_without_being_allocated(preset, parameters):
    config = load_config(str(ROOT / f"configs/{preset}.py"))
    _, params = abstract_model(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    state = jax.eval_shape(lambda: init_state(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == pytest.approx(3 * parameters, rel=1e-6)
    tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
    assert tokens == pytest.approx(100e9 if preset == "moe_700m" else 800e9, rel=1e-3)


def test_the_default_preset_is_a_few_million_parameters():
    _, params = abstract_model(load_config(MOE))
    assert 1e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 10e6


def test_the_exported_700m_config_is_the_preset():
    preset = load_config(str(ROOT / "configs/moe_700m.py"))
    assert preset == MoEHuginnConfig700M()


def test_every_preset_says_command_hardware_and_result():
    for file in (ROOT / "configs").glob("*.py"):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        for promise in (f"configs/{file.name}", "Hardware:", "Expected result:"):
            assert promise in text, f"{file.name} lacks {promise!r}"


def test_the_moe_preset_is_the_public_run_with_experts():
    dense, moe = (load_config(str(ROOT / f"configs/{name}.py")) for name in ("huginn_3_5b", "moe_3_8b"))
    assert dataclasses.replace(moe, moe=dense.moe, run_dir=dense.run_dir) == dense
    optimizer = dense.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.decay) == ("adam_atan2", 4e-5, 4e-5)


def test_overrides_take_dashes_underscores_and_booleans_in_any_case():
    config = parse_config(
        ["--config", MOE, "--train.batch_size", "6", "--train.sequence-length", "128", "--log.wandb", "tRUE",
         "--log.tensorboard=FALSE", "--validation.depths", "1", "3"]
    )  # fmt: skip
    assert (config.train.batch_size, config.train.sequence_length) == (6, 128)
    assert (config.log.wandb, config.log.tensorboard) == (True, False)
    assert config.validation.depths == (1, 3)


def test_a_config_survives_its_json():
    config = load_config(MOE)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stps", "3"], ["--train.stps", "did you mean --train.steps?"]),
        (["--model.width", "100", "--model.heads", "3"], ["model.width=100", "model.heads=3"]),
        (["--moe.active", "9"], ["moe.active=9", "moe.experts=8"]),
        (["--recurrence.mean", "0"], ["recurrence.mean=0", "positive"]),
        (["--recurrence.backprop-depth", "0"], ["recurrence.backprop_depth=0", "positive"]),
        (["--train.steps", "ten"], ["--train.steps", "'ten'"]),
        (["--train.micro-batches", "3"], ["train.batch_size=", "train.micro_batches=3"]),
        (["--train.sequence-length", "100000"], ["train.sequence_length=100000", "model.max_length="]),
        (["--moe.placement", "cor"], ["'cor'", "'injection', 'core'"]),
        (["--log.wandb", "maybe"], ["'maybe'"]),
        (["stray"], ["stray"]),
        (["--train.steps"], ["--train.steps needs a value"]),
        (["--train.steps", "3", "4"], ["--train.steps takes one value"]),
        (["--optimizer.learning_rate", "inf"], ["optimizer.learning_rate=inf", "finite"]),
        (["--moe.balance_weight", "nan"], ["moe.balance_weight=nan"]),
        (["--run_dir", ""], ["run_dir=''"]),
        (["--profile.steps", "10:13", "--train.steps", "6"], ["profile.steps=10:13", "train.steps=6"]),
    ],
)
def test_a_mistake_gets_one_line_that_names_the_value(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", MOE, *arguments])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no config file"]),
        ("x = 1", ["get_config"]),
        ("def get_config(): return 3", ["get_config"]),
        ("import nothing_of_that_name", ["ModuleNotFoundError"]),
    ],
)
def test_a_config_file_that_is_none_gets_one_line(tmp_path, content, words):
    file = tmp_path / "preset.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", str(file)])
    assert str(file) in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_missing_config_option_is_said():
    with pytest.raises(ConfigError, match=r"--config configs/moe\.py"):
        parse_config(["--train.steps", "3"])
    with pytest.raises(ConfigError, match="--config is given twice"):
        parse_config(["--config", "configs/moe.py", "--config=configs/linux.py"])


@pytest.mark.parametrize("broken", [{"bogus": 1}, {"train": {"bogus": 1}}, {"train": {"steps": "x"}}, {"train": 3}])
def test_a_damaged_config_json_is_refused(broken):
    with pytest.raises(ConfigError):
        from_dict(to_dict(Config()) | broken)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--config", MOE, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else []:
            assert f"--{section.name}.{field.name.replace('_', '-')}" in text


def test_dense_is_a_config_without_experts(make_config):
    model = MoEHuginnModel(make_config(moe={"experts": 0}))
    assert model.moe is None
    assert MoEConfig(experts=0).experts == 0
    assert np.isfinite(model(np.zeros((1, 64), np.int32), (1, 1)).logits).all()


# ---- Config files ----------------------------------------------------------------------------------------------------


def test_a_runs_own_config_json_is_a_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(load_config(MOE))))
    config = parse_config(["--config", str(file), "--run_dir", "~/again", "--train.steps", "3"])
    assert config.train.steps == 3
    assert config.run_dir == str(Path.home() / "again")
    assert config.model == load_config(MOE).model


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.yaml", "train: 3", ["x.yaml", "Python file"]),
        ("x.json", "{", ["x.json", "cannot be read"]),
        ("x.json", '{"bogus": 1}', ["x.json", "bogus"]),
        ("x.py", "def get_config():\n    x = 1\n    return x + 'a'", ["line 3", "TypeError"]),
        ("x.py", "def get_config(:", ["line 1", "SyntaxError"]),
    ],
)
def test_a_file_that_gives_no_config_is_one_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_folder_names_the_config_inside(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: give a preset"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"give --config {tmp_path}/config.json"):
        load_config(str(tmp_path))


def test_a_preset_may_use_annotations_dataclasses_and_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_a_preset.py").write_text("WIDTH = 64")
    file = tmp_path / "preset.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbour_of_a_preset import WIDTH\n"
        "from jax_huginn.config.schema import Config, ModelConfig\n"
        "@dataclass\nclass Sizes:\n    width: int = WIDTH\n"
        "def get_config() -> Config:\n"
        "    return Config(model=ModelConfig(width=Sizes().width, heads=2, kv_heads=2))\n"
    )
    assert load_config(str(file)).model.width == 64


def test_help_without_a_preset_lists_the_presets(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for file in (ROOT / "configs").glob("*.py"):
        assert f"configs/{file.name}  " in text


# ---- Users' mistakes and bugs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bug",
    [
        lambda: np.zeros(3).sum(axis=2),  # NumPy's AxisError is a ValueError
        lambda: b"\xff".decode(),  # and so is UnicodeDecodeError
        lambda: json.loads("{"),
        lambda: int("x"),
    ],
    ids=["AxisError", "UnicodeDecodeError", "JSONDecodeError", "ValueError"],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(ValueError):  # noqa: PT011  (whatever it is, it is not turned into an exit)
        run_verb(bug)


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def mistake():
        raise ConfigError("train.steps=0 must be positive\nor else")

    with pytest.raises(SystemExit) as exit_:
        run_verb(mistake)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: train.steps=0 must be positive?or else\n"


def test_a_reader_that_closed_the_pipe_ends_a_command_silently(tmp_path):
    """As `| head` does, whether the output is flushed by the command or left to the end."""
    command = "import sys; from jax_huginn.config.cli import run_verb; run_verb(lambda: print('x' * {}))"
    for length in (10, 1 << 20):
        line = f'set -o pipefail; {sys.executable} -c "{command.format(length)}" | true'
        result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (141, "")


def test_a_broken_pipe_of_something_else_is_a_bug():
    def bug():
        raise BrokenPipeError("a socket of ours")

    with pytest.raises(BrokenPipeError):
        run_verb(bug)


# ---- Old names, and what may change ----------------------------------------------------------------------------------


def test_old_names_are_read_from_old_folders_and_commands():
    old = to_dict(load_config(MOE))
    compute = old.pop("compute")
    old["train"]["deterministic"] = compute.pop("deterministic")
    old["model"] |= {name: compute[name] for name in ("attention", "remat", "unroll", "loss_chunk")}
    assert from_dict(old) == load_config(MOE)
    config = parse_config(["--config", MOE, "--model.remat", "dots", "--train.deterministic", "true"])
    assert (config.compute.remat, config.compute.deterministic) == ("dots", True)


def test_what_may_change_is_whole_sections_and_named_fields():
    old = load_config(MOE)
    may = ["--compute.remat", "full", "--train.steps", "9", "--parallel.fsdp", "2", "--data.bad_rows", "stop"]
    assert changes(old, override(old, may)) == []
    for words in (["--model.dtype", "bfloat16"], ["--model.max_length", "512"], ["--train.seed", "1"]):
        assert len(changes(old, override(old, words))) == 1
    dropping = override(old, ["--parallel.data", "1", "--parallel.dispatch", "all_to_all"])
    assert changes(old, dropping)
    assert all(name in flatten(to_dict(old)) for name in MAY_CHANGE_FIELDS)


def test_a_new_recipe_is_marked_as_what_may_be_accepted():
    old = load_config(MOE)
    recipe = ["--optimizer.learning_rate", "1e-4", "--train.batch_size", "16", "--recurrence.mean", "8"]
    assert [change.may_be_accepted for change in changes(old, override(old, recipe))] == [True, True, True]
    for words in (["--optimizer.name", "muon"], ["--data.source", "text"], ["--model.dtype", "bfloat16"]):
        assert [change.may_be_accepted for change in changes(old, override(old, words))] == [False]
    assert all(name in flatten(to_dict(old)) for name in MAY_BE_ACCEPTED)


def test_weights_fit_whatever_the_type_length_and_loss_weights():
    ours = load_config(MOE)
    same = ["--model.dtype", "bfloat16", "--model.max_length", "512", "--moe.balance_weight", "0"]
    assert differences_of_model(ours, override(ours, same)) == []
    assert differences_of_model(ours, override(ours, ["--model.norm_eps", "1e-5"])) == [("model.norm_eps", 1e-6, 1e-5)]


def test_the_guide_says_what_may_change():
    text = " ".join((ROOT / "docs/training_guide.md").read_text().split())
    assert describe_may_change() in text
