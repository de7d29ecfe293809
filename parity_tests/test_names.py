"""Names, files and init: a model moves between the packages without a loss, and both start it alike."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch_reference
from jax_huginn.config.presets import MoEHuginnConfig700M, load_config
from jax_huginn.interop.model_config import model_config
from jax_huginn.interop.names import from_torch, mappings, params_of, to_torch
from jax_huginn.interop.pth import write_pth
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model
from parity_tests.support import (
    KINDS,
    VALUES,
    array_of,
    check,
    make_batch,
    make_pair,
    torch_forward,
    twin_config,
)
from tests.support import small_config

PRESETS = sorted(Path(__file__).parents[1].glob("configs/*.py"))


# ---- Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=[preset.stem for preset in PRESETS])
def test_every_parameter_of_a_preset_has_exactly_the_name_and_shape_that_torch_gives_it(preset):
    """Each parameter is mapped once, no name is used twice, none is left out on either side."""
    config = load_config(str(preset))
    _, abstract = abstract_model(config)
    with torch.device("meta"):
        twin = torch_reference.MoEHuginnModel(twin_config(config), seed=None)
    expected = {name: tuple(weight.shape) for name, weight in twin.state_dict().items()}
    shapes = {}
    for mapping, leaf in zip(mappings(abstract), jax.tree.leaves(abstract), strict=True):
        shape = leaf.shape[1:] if mapping.stacked else leaf.shape
        for name in mapping.names:
            assert name not in shapes, f"{name} is mapped twice"
            shapes[name] = shape[::-1] if mapping.transposed else shape
    assert shapes == expected


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_to_torch_and_back_bit_for_bit(kind):
    pair = make_pair(kind)
    tensors = dict(to_torch(pair.params))
    assert tensors.keys() == pair.twin.state_dict().keys()
    back = from_torch(abstract_model(pair.config)[1], tensors.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, back, pair.params)
    matrix = pair.twin.state_dict()["transformer.adapter.weight"].numpy()
    np.testing.assert_array_equal(matrix, np.asarray(pair.params["adapter"]).T)


def test_an_unknown_parameter_is_refused_rather_than_dropped():
    with pytest.raises(KeyError, match=r"core\.0\.mystery"):
        list(to_torch({"core": [{"mystery": jnp.zeros(3)}]}))


# ---- Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_pth_is_the_same_model_in_torch(kind, tmp_path):
    """Every weight bit for bit, and the logits within the float32 tolerance."""
    pair = make_pair(kind, "float32")
    write_pth(pair.model(), tmp_path / "model.pth")
    loaded = torch_reference.load_checkpoint(tmp_path / "model.pth")
    for name, value in to_torch(pair.params):
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), value, err_msg=name)
    batch = make_batch(pair.config)
    ours = pair.forward(1)(batch.tokens, batch.labels, np.int32(2), batch.state)
    theirs = torch_forward(loaded, batch, 2, 1)
    check({"logits": array_of(ours.logits)}, {"logits": array_of(theirs.logits)}, VALUES["float32"], "values, float32")


def test_the_700m_preset_is_the_same_shape_in_both_packages():
    """All that shapes the model; the name is a label."""
    expected = torch_reference.MoEHuginnConfig700M()
    for config in (MoEHuginnConfig700M(), load_config(str(PRESETS[0].parent / "moe_700m.py"))):
        assert dataclasses.replace(twin_config(config), name=expected.name) == expected


def test_the_described_model_of_each_kind_is_the_one_that_was_asked_for():
    """The fields of `model_config`, one by one, at values of which no two are equal by chance."""
    config = small_config(model={"kv_heads": 2, "prelude_layers": 3, "coda_layers": 4, "core_layers": 5})
    described = torch_reference.MoEHuginnConfig.from_model_config(model_config(config))
    model, moe, recurrence = config.model, config.moe, config.recurrence
    assert described == torch_reference.MoEHuginnConfig(
        n_embd=model.width,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.mlp_width,
        padded_vocab_size=model.vocab_size,
        block_size=model.max_length,
        n_layers_in_prelude=model.prelude_layers,
        n_layers_in_recurrent_block=model.core_layers,
        n_layers_in_coda=model.coda_layers,
        mean_recurrence=recurrence.mean,
        mean_backprop_depth=recurrence.backprop_depth,
        norm_eps=model.norm_eps,
        rope_base=model.rope_base,
        num_experts=moe.experts,
        moe_k=moe.active,
        moe_intermediate_size=moe.width,
        moe_placement=moe.placement,
        moe_residual=moe.residual,
        balance_weight=moe.balance_weight,
        z_weight=moe.z_weight,
        sampling_scheme=recurrence.scheme,
        name="default",
    )


# ---- Init -------------------------------------------------------------------------------------------------------

TRUNCATED = 0.98658  # std of a normal cut at three of its stds, relative to the uncut one


def group_of(name: str) -> str:
    if name.endswith("qk_bias"):
        return "qk_bias"
    if "norm" in name or "ln_f" in name:
        return "norm"
    if "router" in name:
        return "router"
    if name.endswith("w_down.weight"):
        return "w_down"
    if name.endswith("proj.weight"):
        return "output projection"
    return "embedding" if "wte" in name else "matrix"


@pytest.mark.parametrize("kind", ["injection", "residual", "core"])
@pytest.mark.parametrize("package", ["jax", "torch"])
def test_init_has_the_std_of_the_takase_formula_in_every_group(package, kind):
    """The std of N draws is known to 1 / sqrt(2 N), five of which are allowed, and the mean to std / sqrt(N).

    An expert's w_down ends a residual branch in the core and with `moe.residual`; at the injection without, nothing is
    added to it, and it is a plain matrix.
    """
    config = small_config(**KINDS[kind])
    if package == "jax":
        tensors = dict(to_torch(params_of(MoEHuginnModel(config, seed=3))))
    else:
        twin = torch_reference.MoEHuginnModel(twin_config(config), seed=3)
        tensors = {name: array_of(weight) for name, weight in twin.named_parameters()}
    groups: dict[str, list[np.ndarray]] = {}
    for name, value in tensors.items():
        groups.setdefault(group_of(name), []).append(value.ravel())

    depth = 1 + 2 * 6 + 1  # P + C * mean recurrence + T
    std = np.sqrt(2 / (5 * 32))
    expected = {"embedding": std, "matrix": std, "output projection": std / np.sqrt(2 * depth)}
    expected["w_down"] = expected["matrix" if kind == "injection" else "output projection"]
    for group, untruncated in expected.items():
        draws = np.concatenate(groups[group])
        assert np.abs(draws).max() <= 3 * untruncated * (1 + 1e-6), group
        assert_statistics(draws, TRUNCATED * untruncated, group)
    assert_statistics(np.concatenate(groups["router"]), 0.02, "router")
    assert np.all(np.concatenate(groups["norm"]) == 1)
    assert np.all(np.concatenate(groups["qk_bias"]) == 0)


def assert_statistics(draws: np.ndarray, std: float, group: str) -> None:
    count = draws.size
    assert abs(draws.std() / std - 1) < 5 / np.sqrt(2 * count), f"{group}: std {draws.std():.4f}, expected {std:.4f}"
    assert abs(draws.mean()) < 5 * std / np.sqrt(count), f"{group}: mean {draws.mean():.5f}"
