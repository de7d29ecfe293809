"""The PyTorch twin's start: initial state and weights, its config, and mistakes by name."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.torch_support import DENSE, INJECTION, KINDS, batch, perturbed
from torch_reference import MoEHuginnConfig, MoEHuginnModel
from torch_reference.initial_state import initial_state

ROOT = Path(__file__).resolve().parents[1]

# ---- Initial state and weights --------------------------------------------------------------------------------------


def test_initial_state_depends_on_seed_and_position_alone():
    whole = initial_state(0, 300, 16)
    assert np.array_equal(initial_state(0, 150, 16, start=120), whole[120:270])
    assert np.array_equal(initial_state(0, 5, 16), whole[:5])
    assert initial_state(0, 0, 16).shape == (0, 16)
    assert not np.array_equal(initial_state(1, 300, 16), whole)
    assert whole.dtype == np.float32


def test_initial_state_is_the_recipe_both_packages_hold():
    for position in (0, 131):
        generator = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, 0, position]))
        x = generator.standard_normal(2000)  # wide enough that some lie beyond three
        assert (np.abs(x) > 3).any()
        while (np.abs(x) > 3).any():
            bad = np.abs(x) > 3
            x[bad] = generator.standard_normal(bad.sum())
        expected = (x * np.sqrt(2 / 5)).astype(np.float32)
        assert np.array_equal(initial_state(7, 1, 2000, start=position)[0], expected)
    state = initial_state(0, 200, 1000)
    assert state.var() == pytest.approx(0.389, abs=0.003)
    assert np.abs(state).max() <= 3 * np.sqrt(0.4) + 1e-6


def test_rows_share_the_initial_state_so_that_batches_do_not_matter():
    model, tokens = perturbed(INJECTION), batch(INJECTION, rows=3)
    together = model(tokens, num_steps=(3, 0)).logits
    alone = torch.cat([model(row[None], num_steps=(3, 0)).logits for row in tokens])
    assert torch.allclose(together, alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("moe", [{}, {"moe_residual": True}, {"moe_placement": "core"}])
def test_initial_weights_follow_takase(moe):
    """The experts' w_down is an output projection where the MoE is a residual branch, else a plain matrix."""
    config = replace(INJECTION, n_embd=64, intermediate_size=96, moe_intermediate_size=96, **moe)
    weights = MoEHuginnModel(config, seed=3).state_dict()
    std, depth = (2 / (5 * 64)) ** 0.5, 1 + 2 * 6 + 1
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        elif "qk_bias" in name:
            assert (weight == 0).all(), name
        else:
            is_output = name.endswith(".proj.weight") or (name.endswith("w_down.weight") and bool(moe))
            expected = 0.02 if "router" in name else 0.987 * std / ((2 * depth) ** 0.5 if is_output else 1)
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name
            if "router" not in name:
                assert weight.abs().max() <= 3.001 * expected / 0.987, name
    again, other = (MoEHuginnModel(config, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert not torch.equal(weights["transformer.wte.weight"], other["transformer.wte.weight"])


# ---- Mistakes are named ---------------------------------------------------------------------------------------------


def test_calls_that_cannot_work_name_the_value():
    model, tokens = MoEHuginnModel(DENSE), batch(DENSE)
    with pytest.raises(ValueError, match=r"128 tokens is longer than .*block_size=96"):
        model(tokens.repeat(1, 2))
    with pytest.raises(ValueError, match=r"num_steps=\(-1, 2\)"):
        model(tokens, num_steps=(-1, 2))
    for wrong in (48, -1):
        with pytest.raises(ValueError, match=rf"^tokens holds {wrong}, but the model's ids are 0 to 47$"):
            model(tokens.where(tokens != tokens[1, 5], wrong))
    for misshapen in (tokens[0], tokens[None], tokens[:, :0], tokens.float()):
        with pytest.raises(ValueError, match=r"^tokens must be integers of shape \(batch, sequence\), not torch"):
            model(misshapen)
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 64, 32\), not \(2, 64, 32\)"):
        model(tokens, initial_state=torch.zeros(1, 64, 32))


@KINDS
def test_config_survives_the_file_layout(config):
    config = replace(config, rope_base=10_000.0, norm_eps=1e-5, name="x", balance_weight=0.02)
    values = config.to_model_config()
    same = config if config.num_experts else replace(config, moe_k=2, moe_intermediate_size=0)
    restored = MoEHuginnConfig.from_model_config(values)
    assert restored == same if config.num_experts else restored.to_model_config() == values
    assert values["rope_settings"] == {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 10_000.0}
    assert ("num_experts" in values) == (config.num_experts > 0)
    layout = {
        "name", "architecture_class_name", "n_embd", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "padded_vocab_size", "vocab_size", "block_size", "norm_eps", "n_layers_in_prelude",
        "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_recurrence", "mean_backprop_depth",
        "injection_type", "tie_embeddings", "qk_bias", "bias", "rope_settings", "block_class_name",
        "norm_class_name", "mlp_class_name", "nonlin_name", "init_strategy", "sampling_scheme",
    }  # fmt: skip
    moe = {
        "num_experts", "moe_k", "moe_intermediate_size", "moe_placement", "moe_residual", "balance_weight", "z_weight",
    }  # fmt: skip
    assert set(values) == layout | (moe if config.num_experts else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_class_name": "TransformerPreNormBlock"}, "block_class_name='TransformerPreNormBlock'"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm'"),
        ({"mlp_class_name": "BaseMLP"}, "mlp_class_name='BaseMLP'"),
        ({"nonlin_name": "ReLU"}, "nonlin_name='ReLU'"),
        ({"injection_type": "add"}, "injection_type='add'"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"qk_bias": False}, "qk_bias=False"),
        ({"bias": True}, "bias=True"),
        ({"rope_settings": {"use_rope": False}}, "rope_settings.use_rope=False"),
        ({"rope_settings": {"rope_condense_ratio": 2}}, "rope_settings.rope_condense_ratio=2"),
        ({"rope_settings": 3}, "rope_settings=3"),
        ({"n_embd": None}, "n_embd is missing"),
        ({"n_embd": "32"}, "n_embd='32' must be of type int"),
        ({"n_embd": 30}, "n_embd=30 must be divisible by num_attention_heads=4"),
        ({"n_embd": 36}, "n_embd=36 over num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"moe_k": 5}, "moe_k=5 is more than num_experts=4"),
        ({"moe_placement": "coda"}, "moe_placement='coda'"),
        ({"moe_placement": "core", "moe_residual": True}, "moe_residual=True"),
        ({"mean_recurrence": 0}, "mean_recurrence=0 must be positive"),
        ({"norm_eps": float("inf")}, "norm_eps=inf must be a finite number"),
        ({"rope_settings": {"rope_base": float("nan")}}, "rope_base=nan must be a finite number"),
        ({"block_size": 10**12}, "block_size=1000000000000 is more than 16777216"),
    ],
)
def test_config_refuses_what_it_cannot_represent(change, message):
    with pytest.raises(ValueError, match=r"^model_config\.") as error:
        MoEHuginnConfig.from_model_config({**INJECTION.to_model_config(), **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_public_config_without_key_heads_is_read():
    values = DENSE.to_model_config()
    del values["num_key_value_heads"]
    assert MoEHuginnConfig.from_model_config(values).num_key_value_heads == 4


def test_imports_no_jax():
    code = "import sys, torch_reference; sys.exit(any(name in sys.modules for name in ('jax', 'jax_huginn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
