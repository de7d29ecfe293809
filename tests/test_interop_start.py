"""`--checkpoint.init_from`: a run starts from the weights of a run, a `.pth` or a folder, and only starts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_huginn.checkpoints.import_run import import_weights
from jax_huginn.checkpoints.init_from import adopt_tokenizer, load_into, open_start
from jax_huginn.checkpoints.sources import load_checkpoint
from jax_huginn.checkpoints.step_folders import CheckpointError
from jax_huginn.config.checks import ConfigError, UserError
from jax_huginn.config.schema import CheckpointConfig, Config, DataConfig
from jax_huginn.data.tokenizer import save_tokenizer, train_tokenizer
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.huggingface import read_huggingface, write_huggingface
from jax_huginn.interop.names import params_of
from jax_huginn.interop.pth import write_pth
from jax_huginn.model.huginn import abstract_model
from jax_huginn.training.loop import train
from tests.support import random_model, small_config

SOURCES = ("run", "run/checkpoints", "run/checkpoints/0", "folder", "model.pth")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One model as a run, as a folder with its tokenizer and as a `.pth` without."""
    folder = tmp_path_factory.mktemp("sources")
    model = random_model(small_config(model={"vocab_size": 320}))
    save_tokenizer(train_tokenizer(["a recurrent tale"] * 3, 270), folder / "tokenizer_of_it")
    write_huggingface(model, folder / "folder", folder / "tokenizer_of_it")
    import_weights(read_huggingface(folder / "folder"), folder / "run")
    write_pth(model, folder / "model.pth")
    return folder, model


def starting(config: Config, path, **model) -> Config:
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(init_from=str(path)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{"vocab_size": 320, **model}))


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_weights(sources, make_config, source):
    folder, model = sources
    config = starting(make_config(), folder / source, param_dtype="float64", dtype="float64", max_length=64)
    fresh = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract_model(config)[1])
    start = open_start(config)
    assert start is not None
    loaded = load_into(start, fresh)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float64)}
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(model))
    assert (start.tokenizer is None) == (source == "model.pth")


@pytest.mark.parametrize("source", ["run", "folder", "model.pth"])
def test_weights_of_another_shape_are_refused_by_the_first_field_that_differs(sources, make_config, source):
    folder, _ = sources
    for fields, message in (
        ({"vocab_size": 256}, "has model.vocab_size=320, this run 256: give --model.vocab_size 320"),
        ({"heads": 2, "kv_heads": 2, "mlp_width": 9}, "has model.heads=4, this run 2"),
        ({"coda_layers": 2}, "has model.coda_layers=1, this run 2"),
        ({"rope_base": 1e4}, "has model.rope_base=50000.0, this run 10000.0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_start(starting(make_config(), folder / source, **fields))
    for moe, message in (({"experts": 0}, "has moe.experts=4, this run 0"), ({"active": 1}, "has moe.active=2")):
        with pytest.raises(CheckpointError, match=message):
            open_start(starting(make_config(moe=moe), folder / source))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(make_config, tmp_path, bad):
    model = random_model(small_config(model={"vocab_size": 320}))
    model.adapter[...] = model.adapter[...].at[3, 5].set(bad)
    write_pth(model, tmp_path / "model.pth")
    config = starting(make_config(), tmp_path / "model.pth")
    start = open_start(config)
    assert start is not None
    fresh = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract_model(config)[1])
    with pytest.raises(WeightsError, match=r"model\.pth: transformer\.adapter\.weight holds numbers that are not"):
        load_into(start, fresh)


def test_nothing_to_start_from_is_one_line(sources, make_config, tmp_path):
    assert open_start(make_config()) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "text.pth").write_text("x")
    for path, message in (
        (tmp_path / "absent", "no model at .*absent: give a run folder"),
        (tmp_path, "no checkpoint in"),
        (tmp_path / "text.pth", "broken, or not written by torch.save"),
    ):
        config = dataclasses.replace(starting(make_config(), path), run_dir=str(tmp_path / "run"))
        with pytest.raises(UserError, match=message):
            train(config)
        assert not (tmp_path / "run").exists()  # its config would be compared with the corrected one


def test_a_start_brings_its_tokenizer_unless_the_run_names_one(sources, make_config, tmp_path):
    folder, _ = sources
    adopted = tmp_path / "tokenizer/tokenizer.json"
    config = starting(make_config(), folder / "folder")
    start = open_start(config)
    assert start is not None
    named = dataclasses.replace(config, data=DataConfig(source="stdlib", tokenizer="other"))
    line = adopt_tokenizer(start, named, tmp_path)
    assert line is not None
    assert "the tokenizer is data.tokenizer=other, not the one beside these weights: if the two differ, give" in line
    assert line.endswith(f"--data.tokenizer {folder / 'folder'}")
    same = dataclasses.replace(config, data=DataConfig(source="stdlib", tokenizer=str(folder / "folder")))
    assert adopt_tokenizer(start, same, tmp_path) is None
    assert not adopted.exists()
    assert adopt_tokenizer(start, config, tmp_path) is None
    assert adopted.read_bytes() == (folder / "folder/tokenizer.json").read_bytes()
    config = starting(make_config(), folder / "model.pth")
    start = open_start(config)
    assert start is not None
    warning = adopt_tokenizer(start, config, tmp_path / "other")
    assert warning is not None
    assert "give theirs by --data.tokenizer" in warning
    parquet = dataclasses.replace(config, data=DataConfig(source="parquet"))
    assert adopt_tokenizer(start, parquet, tmp_path / "other") is None


def test_training_starts_from_weights_and_then_resumes_its_own(make_config, tmp_path, capsys):
    smallest = {"vocab_size": 320, "prelude_layers": 0, "core_layers": 1, "coda_layers": 0}  # quick to compile
    config = make_config(model=smallest, moe={"experts": 0})
    model = random_model(config)
    save_tokenizer(train_tokenizer(["a recurrent tale"] * 3, 270), tmp_path / "tokenizer")
    write_huggingface(model, tmp_path / "weights", tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for index in range(8):
        (tmp_path / f"text/{index}.txt").write_text("a tale told by a recurrent idiot " * 400)
    config = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        checkpoint=CheckpointConfig(init_from=str(tmp_path / "weights")),
        train=dataclasses.replace(config.train, steps=1, batch_size=2, sequence_length=32),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-9),
        data=DataConfig(source="text", path=str(tmp_path / "text"), streams=2, validation_fraction=0.0),
        log=dataclasses.replace(config.log, tensorboard=False),
    )
    train(config)
    printed = capsys.readouterr().out
    for line in ("weights of", "making the initial state", "reading the first rows", "compiled in"):
        assert line in printed
    for ours, theirs in zip(
        jax.tree.leaves(params_of(model)), jax.tree.leaves(params_of(load_checkpoint(tmp_path / "run"))), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, atol=1e-6)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    used = (tmp_path / "run/tokenizer/tokenizer.json").read_bytes()
    assert used == (tmp_path / "weights/tokenizer.json").read_bytes()

    # Its own checkpoint wins: what the weights came from may even be gone.
    gone = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, init_from="gone"))
    assert open_start(gone) is None
    train(gone)
    assert "step 1 of 1" in capsys.readouterr().out


def test_an_imported_run_is_not_trained_but_started_from(sources, make_config):
    folder, _ = sources
    config = dataclasses.replace(starting(make_config(), ""), run_dir=str(folder / "run"))
    before = (folder / "run/config.json").read_text()
    with pytest.raises(ConfigError, match=r"no optimiser state .* --checkpoint\.init_from .*/run$"):
        train(config)
    replacing = CheckpointConfig(init_from=str(folder / "run"), resume=False, overwrite=True)
    with pytest.raises(CheckpointError, match="is the run's own folder"):
        train(dataclasses.replace(config, checkpoint=replacing))
    assert (folder / "run/config.json").read_text() == before
    assert (folder / "run/checkpoints/0").is_dir()
