"""A Hugging Face folder that is not ours: huginn-0125's form is read, and a bad one refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import torch_reference
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.huggingface import read_huggingface, write_huggingface
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.interop.open_weights import open_weights
from tests.support import random_model, small_config

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in huginn-0125's form, written by the safetensors library: bfloat16, two shards, an index."""
    folder = tmp_path_factory.mktemp("public") / "huginn"
    write_huggingface(random_model(small_config(moe={"experts": 0})), folder, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = dict(zip(FILES, (names[:10], names[10:]), strict=True))
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {n: file for file, half in halves.items() for n in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def changed(folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "huginn"))


def edit(file: Path, **fields) -> None:
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        open_weights(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_sharded_bfloat16_is_read_to_the_bit(folder, make_config):
    weights = open_weights(folder)
    config = make_config(moe={"experts": 0})
    assert weights.config.recurrence == config.recurrence
    assert weights.tokenizer is None
    assert {tensor.dtype.name for tensor in weights.tensors.values()} == {"bfloat16"}
    for name, tensor in to_torch(params_of(random_model(config))):
        rounded = torch.from_numpy(np.array(tensor)).bfloat16().float().numpy()
        np.testing.assert_array_equal(weights.tensors[name].read().astype(np.float32), rounded, err_msg=name)


def test_what_folders_may_leave_out_or_write_otherwise(changed):
    """A fresher transformers writes `dtype`; its savers drop tied tensors, and fields besides ours are ignored."""
    edit(changed / "config.json", torch_dtype=..., dtype="bfloat16", architectures=["RavenForCausalLM"],
         tie_word_embeddings=True, test_time_noise=0, auto_map={"AutoModel": "x.Model"}, rope_base=50000)  # fmt: skip
    edit(changed / "config.json", n_heads=..., num_attention_heads=4)
    open_weights(changed)
    tensors = {name: tensor for file in FILES for name, tensor in load_file(changed / file).items()}
    del tensors["transformer.wte.weight"], tensors["freqs_cis"]
    save_file(tensors, changed / "model.safetensors")
    assert "transformer.wte.weight" in open_weights(changed).tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is neither 'huginn_raven' nor 'moe_huginn'"),
        ({"model_type": ...}, "model_type=None is neither"),
        ({"block_class_name": "TransformerPreNormBlock"}, "block_class_name='TransformerPreNormBlock' cannot be"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm' cannot be"),
        ({"injection_type": "add"}, "injection_type='add' cannot be represented here, only 'linear'"),
        ({"tie_embeddings": False}, "tie_embeddings=False cannot be"),
        ({"test_time_noise": 0.1}, "test_time_noise=0.1 cannot be"),
        ({"n_embd": ...}, "n_embd is missing"),
        ({"n_embd": 64}, "has shape"),
        ({"rope_base": 10_000.0}, "freqs_cis is off by"),
        ({"mean_recurrence": 0}, "describes no model: recurrence.mean=0 must be positive"),
    ],
)
def test_a_config_of_another_model_is_refused(changed, fields, message):
    edit(changed / "config.json", **fields)
    assert message in refusal(changed)


def test_broken_folders_are_refused(changed, tmp_path):
    index = changed / "model.safetensors.index.json"
    whole = index.read_text()
    where = json.loads(whole)["weight_map"]
    for weight_map, message in (
        (..., "no 'weight_map'"),
        ({"x": 3}, "no 'weight_map'"),
        ({"x": "../../etc/passwd"}, "is not a file of this folder"),
        ({"x": "absent.safetensors"}, "absent.safetensors: no such file"),
        ({**where, "transformer.more": FILES[0]}, "transformer.more is missing"),
        ({n: f for n, f in where.items() if n != "transformer.ln_f.weight"}, "transformer.ln_f.weight is missing"),
    ):
        edit(index, weight_map=weight_map)
        assert message in refusal(changed)
        index.write_text(whole)
    index.write_text(whole[:-20])
    assert "cannot be read as JSON" in refusal(changed)
    index.unlink()
    assert "model.safetensors: no such file" in refusal(changed)
    (changed / "config.json").unlink()
    assert "neither a run nor a Hugging Face folder" in refusal(changed)
    assert f"no model at {tmp_path / 'absent'}: give a run folder" in refusal(tmp_path / "absent")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:100],
        lambda whole: whole[:4],
        lambda _: b"",
        lambda whole: (2**60).to_bytes(8, "little") + whole[8:],
        lambda whole: whole.replace(b'"shape":[', b'"shape":[-', 1),
        lambda whole: whole.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
        lambda _: (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_broken_shard_is_refused(changed, damage):
    shard = changed / FILES[0]
    before = shard.read_bytes()
    after = damage(before)
    assert after != before
    shard.write_bytes(after)
    assert f"{FILES[0]}: broken, or no safetensors file" in refusal(changed)


def test_numbers_of_eight_bits_are_refused_by_the_tensor_in_both_packages(changed):
    """No reader may take them for something else: their scales lie elsewhere, in a way of each writer's own."""
    name = "transformer.ln_f.weight"
    for file in FILES:
        tensors = load_file(changed / file)
        if name in tensors:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, changed / file)
    assert f"{name} has numbers of type F8_E4M3, which is not read here" in refusal(changed)
    with pytest.raises(torch_reference.CheckpointError, match=f"{name} is not a tensor of floating-point numbers"):
        torch_reference.load_checkpoint(changed)


def test_our_own_type_says_what_kind_of_model_it_is(make_config, tmp_path):
    config = make_config(moe={"placement": "core"}, model={"kv_heads": 2})
    write_huggingface(random_model(config), tmp_path / "folder")
    assert read_huggingface(tmp_path / "folder").config.moe == config.moe
    edit(tmp_path / "folder/config.json", moe_placement="coda")
    assert "moe_placement='coda' cannot be represented here, only 'injection' or 'core'" in refusal(tmp_path / "folder")
