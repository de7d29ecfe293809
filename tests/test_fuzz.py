"""Damaged inputs give one-line errors of our own and nothing else; `scripts/fuzz.py` does it at length."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest

from jax_huginn.config.checks import LONGEST, ConfigError, UserError
from jax_huginn.config.dicts import from_dict, to_dict
from jax_huginn.config.schema import Config
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.open_weights import open_weights
from jax_huginn.interop.torch_archive import TorchArchive
from scripts.fuzz import TARGETS, fuzz, make_files


@pytest.fixture
def good(tmp_path):
    make_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_give_our_errors_only(target):
    outcomes, failures = fuzz([target], cases=60, seed=1)
    assert failures == []
    refused = sum(count for outcome, count in outcomes[target].items() if outcome.endswith("Error"))
    assert refused > 45  # the damage reaches what it should


def test_the_fuzzer_knows_what_is_no_error_of_ours(monkeypatch):
    def traceback(*_):
        raise KeyError("a fault of the program")

    def two_lines(*_):
        error = WeightsError("")
        error.args = ("one\ntwo",)
        raise error

    monkeypatch.setitem(TARGETS, "pth", traceback)
    assert fuzz(["pth"], cases=2, seed=0)[1][0].startswith("pth 0: FAILED: KeyError")
    monkeypatch.setitem(TARGETS, "pth", two_lines)
    assert "not one line" in fuzz(["pth"], cases=1, seed=0)[1][0]


def test_an_error_is_one_line_of_what_can_be_printed():
    text = str(UserError("a\nb\x1b[2J\u202e c" + "x" * 9999))
    assert text.startswith("a?b?[2J? c") and len(text) < LONGEST + 10


def test_ten_bytes_do_not_take_the_memory(tmp_path):
    """A memo index of 2^28 made the C unpickler touch 4 GB."""
    import resource

    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02Nr\xff\xff\xff\x0f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert TorchArchive(tmp_path / "bomb.pth").content is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_compressed_archive_is_refused_before_it_grows(good):
    with zipfile.ZipFile(good / "model.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(good / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match=r"torch\.save did not write"):
        open_weights(good / "packed.pth")


def test_a_model_of_a_million_blocks_is_refused_before_it_is_made(good):
    file = good / "hf/config.json"
    described = json.loads(file.read_text())
    for field, value, words in (("n_layers_in_prelude", 10**6, "more than 256"), ("num_experts", 10**6, "too few")):
        file.write_text(json.dumps({**described, field: value}))
        with pytest.raises(WeightsError, match=words):
            open_weights(good / "hf")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "width", 32.0),
        ("model", "width", True),
        ("compute", "attention", "fast"),
        ("model", "dtype", {"a": 1}),
        ("optimizer", "weight_decay", "0.1"),
        ("validation", "depths", [1, "2"]),
        ("validation", "depths", 4),
        ("log", "wandb", 1),
    ],
)
def test_a_field_of_another_type_is_named(section, field, value):
    values = to_dict(Config())
    values[section][field] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{field}=.* is not of the type "):
        from_dict(values)


def test_configs_survive_json():
    config = dataclasses.replace(Config(), run_dir="elsewhere")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.2, eps=1))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_weights_that_are_not_finite_are_not_imported(good):
    """A step of a run never holds such numbers, be it step 0."""
    from jax_huginn.checkpoints.import_run import import_weights

    weights = open_weights(good / "hf")
    poisoned = next(name for name in weights.tensors if "norm_1" in name)
    tensor = weights.tensors[poisoned]
    bad = dataclasses.replace(tensor, read=lambda: np.full(tensor.shape, np.nan, tensor.dtype))
    weights = dataclasses.replace(weights, tensors={**weights.tensors, poisoned: bad})
    with pytest.raises(WeightsError, match=r"norm_1.weight holds numbers that are not finite"):
        import_weights(weights, good / "new")
    assert not (good / "new").exists()
