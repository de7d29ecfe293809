"""The package from Python: its face, the page docs/from_python.md line by line, and calls that cannot work."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_huginn
from jax_huginn.checkpoints.import_run import write_run
from jax_huginn.config.checks import ConfigError
from jax_huginn.data.tokenizer import save_tokenizer, train_tokenizer
from jax_huginn.interop.names import params_of
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.model.inputs import token_array
from tests.support import random_model, small_config

PAGE = Path(__file__).parents[1] / "docs/from_python.md"


def test_the_package_shows_what_it_has():
    assert {"Config", "MoEHuginnConfig700M", "MoEHuginnModel", "__version__", "load_checkpoint"} <= set(dir(jax_huginn))
    assert set(jax_huginn.__all__) <= set(dir(jax_huginn))
    assert all(getattr(jax_huginn, name) is not None for name in jax_huginn.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", jax_huginn.__version__)
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        jax_huginn.Confg  # noqa: B018


def test_every_line_of_the_page_runs_and_gives_the_right_numbers(tmp_path, monkeypatch, capsys):
    config = small_config(model={"vocab_size": 300, "core_layers": 1, "dtype": "float32"})
    save_tokenizer(train_tokenizer(["def add(a, b):\n    return a + b\n"] * 9, 300), tmp_path / "tokenizer")
    write_run(params_of(MoEHuginnModel(config)), config, tmp_path / "runs/moe", tmp_path / "tokenizer")
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", PAGE.read_text(), flags=re.MULTILINE)
    page: dict = {}
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(textwrap.dedent(block), PAGE.name, "exec"), page)

    log_ppl = page["scored"].log_ppl
    np.testing.assert_allclose(-page["each"].mean(), log_ppl, rtol=1e-5)
    np.testing.assert_allclose(page["bits_per_byte"], log_ppl * page["each"].size / np.log(2) / 32, rtol=1e-5)
    assert page["logits_of"]._cache_size() == 1
    twin, tensors = page["twin"], [page["torch"].from_numpy(page[name].copy()) for name in ("inputs", "labels")]
    np.testing.assert_allclose(page["before"], twin(tensors[0], (2, 2), labels=tensors[1]).loss.item(), rtol=1e-5)
    assert page["after"] < page["before"] - 0.01
    assert page["routing"].counts_E.sum() == 2 * page["tokens"].size
    assert page["config"].train == page["jax_huginn"].MoEHuginnConfig700M(train={"steps": 960}).train
    np.testing.assert_allclose(page["out"].logits, page["same"].numpy(), atol=1e-5)
    assert "tokens holds 1000000, but the model's ids are 0 to 299" in capsys.readouterr().out


def test_the_700m_config_takes_fields():
    changed = jax_huginn.MoEHuginnConfig700M(run_dir="x", moe={"experts": 4}, train={"steps": 7})
    preset = jax_huginn.MoEHuginnConfig700M()
    assert (changed.run_dir, changed.moe.experts, changed.moe.width) == ("x", 4, preset.moe.width)
    assert (changed.train.steps, changed.train.batch_size) == (7, 512)
    assert jax_huginn.MoEHuginnConfig700M(moe=changed.moe).moe == changed.moe
    for fields, message in (
        ({"experts": 4}, r"unknown field experts=4"),
        ({"moe": {"expert": 4}}, r"unknown field moe\.expert=4"),
        ({"moe": {"active": 9}}, r"moe\.active=9 is more than moe\.experts=8"),
    ):
        with pytest.raises(ConfigError, match=message):
            jax_huginn.MoEHuginnConfig700M(**fields)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 95, 96]], "tokens holds 96, but the model's ids are 0 to 95"),
        (jnp.array([[-1]]), "tokens holds -1, but the model's ids are 0 to 95"),
        (np.zeros(5, int), r"tokens must be integers of shape \(batch, sequence\), not int64 of shape \(5,\)"),
        (np.zeros((2, 0), int), r"tokens must be integers of shape \(batch, sequence\), not int64 of shape \(2, 0\)"),
        (np.zeros((2, 3)), r"tokens must be integers of shape \(batch, sequence\), not float64 of shape \(2, 3\)"),
        (np.zeros((1, 129), int), r"sequence of 129 tokens is longer than model\.max_length=128"),
    ],
)
def test_tokens_that_no_model_can_read_are_one_line(tokens, message):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(tokens)


def test_labels_and_depths_that_cannot_be_are_one_line():
    model, tokens = random_model(small_config()), np.zeros((2, 3), int)
    for arguments, message in (
        ({"labels": tokens + 96}, "labels holds 96, but the model's ids are 0 to 95"),
        ({"labels": tokens[:, 1:]}, r"labels has shape \(2, 2\), not \(2, 3\) as tokens"),
        ({"num_steps": (-1, 2)}, r"num_steps=\(-1, 2\) must not be negative"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            model(tokens, **arguments)


def test_shapes_are_checked_under_jit_too_and_ignored_labels_are_allowed():
    with pytest.raises(ValueError, match=r"not int32 of shape \(5,\)"):
        jax.jit(lambda tokens: token_array("tokens", tokens, 96))(jnp.zeros(5, jnp.int32))
    np.testing.assert_array_equal(token_array("labels", [[-100, 3]], 4, ignored=-100), [[-100, 3]])
