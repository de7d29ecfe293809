"""A `.pth` that is not ours: a public training file is understood, and another model refused by name."""

import collections
import dataclasses
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jax_huginn.interop.pth import PREFIX, read_pth
from tests.pth_support import assert_holds, refusal

pytest_plugins = "tests.pth_support"  # its fixtures

# ---- A public training file ---------------------------------------------------------------------------------------


class Stateful:
    """A stand-in of a tokenizer, loader or optimiser: an object with attributes, among them tensors and itself."""

    def __init__(self, **attributes):
        self.__dict__ |= attributes
        self.me = self


@dataclasses.dataclass
class RoPESettings:
    use_rope: bool = True
    rope_condense_ratio: int = 1
    rope_base: int = 50_000


@dataclasses.dataclass
class ConfigObject:
    """Pickled as the public code pickles its config: by a state of its own that names the class."""

    fields: dict[str, Any]

    def __getstate__(self):
        return {**self.fields, "_class_name": "RecurrentConfig"}

    def __setstate__(self, state):
        raise AssertionError("nothing of the file may run")


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """Our description with the fields that the public one has besides, at the public run's values."""
    besides = {"hf_config": {"org": "x"}, "padding_multiple": 4096, "use_abacus": False, "abacus_ids": [0, 1],
               "randomize_positions_from": None, "attn_impl": "sdpa", "lm_head_bias": False, "init_orthogonal": False,
               "mup_model_scaling_factor": 1, "clip_qkv": None, "qk_norm": False, "embed_step": False,
               "normalize_rec": "", "intermediate_noise_injection": 0.0, "state_init": "like-init", "seers": 0,
               "activation_checkpoint_impl": "per-iteration", "strategy": "single", "norm_eps": 0.000001}  # fmt: skip
    return {**config, **besides}


@pytest.mark.parametrize("form", ["dict", "object", "object of objects"])
def test_a_public_training_file_is_read(dense, content, tmp_path, monkeypatch, form):
    config: Any = public_config(content["model_config"])
    if form == "object of objects":
        config["rope_settings"] = RoPESettings()
    if form != "dict":
        config = ConfigObject(config)
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in content["model"].items()}
    head = weights[PREFIX + "lm_head.weight"] = weights[PREFIX + "transformer.wte.weight"]
    model = collections.OrderedDict(weights)
    model._metadata = collections.OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    public = {
        "model": model,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(4)}}, "groups": [Stateful(lr=0.1)]},
        "tokenizer": Stateful(vocab={"a": 0}, merges=[("a", "b")], regex=Path("x")),
        "train_dataloader": Stateful(position=np.arange(4), random=np.random.default_rng(0), head=head),
        "model_config": config,
        "microbatch_step": 12,
    }
    torch.save(public, tmp_path / "public.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "public.pth", weights_only=True)
    for name in ("Stateful", "RoPESettings", "ConfigObject"):  # where it is read, the public classes are missing
        monkeypatch.delattr(sys.modules[__name__], name)
    assert_holds(tmp_path / "public.pth", dense)
    described = read_pth(tmp_path / "public.pth").config
    assert described.recurrence == dense.config.recurrence
    assert described.model.rope_base == 50_000.0


# ---- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_class_name", "TransformerPreNormBlock"),
        ("norm_class_name", "LayerNorm"),
        ("injection_type", "add"),
        ("mlp_class_name", "BaseMLP"),
        ("nonlin_name", "GELU"),
        ("architecture_class_name", "GPT"),
        ("tie_embeddings", False),
        ("qk_bias", False),
        ("bias", True),
        ("qk_norm", True),
        ("clip_qkv", 8.0),
        ("lm_head_bias", True),
        ("embed_step", True),
        ("state_init", "zero"),
        ("sampling_scheme", "negative-binomial"),
        ("n_embd", "32"),
        ("n_embd", True),
        ("num_attention_heads", 5),
        ("norm_eps", None),
        ("rope_settings", {"use_rope": False}),
        ("rope_settings", {"rope_condense_ratio": 2}),
        ("rope_settings", 3),
        ("n_layers_in_coda", None),
        ("num_experts", 2),
        ("block_size", 10**12),
    ],
)
def test_a_model_that_we_cannot_be_is_refused_by_field_and_value(dense, content, tmp_path, field, value):
    content["model_config"][field] = value
    torch.save(content, tmp_path / "other.pth")
    if field == "norm_eps":  # None is as good as absent, and an absent field with a default has it
        assert_holds(tmp_path / "other.pth", dense)
        return
    message = refusal(tmp_path / "other.pth")
    if field == "num_attention_heads":
        assert "model.heads=5" in message
    elif field == "block_size":
        assert "model.max_length=1000000000000 is more than 16777216" in message
    elif field == "num_experts":
        assert "transformer.moe." in message
        assert "is missing" in message
    elif isinstance(value, dict):
        name, only = next(iter(value.items()))
        assert f"model_config.rope_settings.{name}={only!r}" in message
    elif value is None:
        assert "model_config.n_layers_in_coda is missing" in message
    else:
        assert f"model_config.{field}={value!r}" in message or f"model_config.{field} is not a dict" in message


def set_weight(name, make):
    def change(content):
        content["model"][PREFIX + name] = make(content["model"].get(PREFIX + name))

    return change


LN_F, ADAPTER = "transformer.ln_f.weight", "transformer.adapter.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_weight("lm_head.weight", lambda x: x + 1), "lm_head.weight differs from transformer.wte.weight"),
        (set_weight("freqs_cis", lambda x: x.roll(1, 1)), "freqs_cis is off by"),
        (set_weight("freqs_cis", lambda x: x * float("nan")), "freqs_cis is off by"),
        (set_weight("freqs_cis", lambda x: x[:, :8]), "freqs_cis has shape (1, 8, 1, 4, 2), not (1, 128, 1, 4, 2)"),
        (set_weight(LN_F, lambda x: x[:8]), "transformer.ln_f.weight has shape (8,), not (32,)"),
        (set_weight(LN_F, lambda _: "text"), "transformer.ln_f.weight is not a tensor"),
        (set_weight(LN_F, lambda x: x.int()), "ln_f.weight is not a tensor of floating"),
        (set_weight("transformer.ln_g.weight", lambda _: torch.ones(16)), "ln_g.weight is not a tensor of this"),
        (lambda content: content["model"].pop(PREFIX + ADAPTER), f"{ADAPTER} is missing"),
        (lambda content: content["model"].update({LN_F: torch.ones(16)}), "is there twice"),
        (lambda content: content.pop("model_config"), "not a dict of 'model' and 'model_config'"),
        (lambda content: content.pop("model"), "not a dict of 'model' and 'model_config'"),
        (lambda content: content.update(model_config=None), "model_config is not a dict"),
    ],
)  # fmt: skip
def test_a_file_of_other_tensors_is_refused_by_name(content, tmp_path, change, message):
    change(content)
    torch.save(content, tmp_path / "changed.pth")
    assert message in refusal(tmp_path / "changed.pth")


def test_what_files_may_leave_out_or_write_otherwise(dense, content, tmp_path):
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content["model"].items()}
    weights["freqs_cis"] = weights["freqs_cis"].bfloat16()
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()  # a storage of its own
    torch.save({**content, "model": weights}, tmp_path / "file.pth")
    assert_holds(tmp_path / "file.pth", dense)
    del weights["freqs_cis"], weights["transformer.wte.weight"]  # of two tied tensors one is enough
    weights[ADAPTER] = weights[ADAPTER].T.contiguous().T  # strides
    torch.save({**content, "model": weights}, tmp_path / "file.pth")
    assert_holds(tmp_path / "file.pth", dense)


def test_missing_broken_and_foreign_files_are_refused(ours, content, tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    whole = ours.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        assert "broken, or not written by torch.save" in refusal(tmp_path / "cut.pth")
    needle = content["model"][PREFIX + ADAPTER].numpy().tobytes()[:32]
    place = whole.index(needle)
    (tmp_path / "flipped.pth").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    assert "Bad CRC-32" in refusal(tmp_path / "flipped.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint\n" * 50)
    assert "broken, or not written by torch.save" in refusal(tmp_path / "text.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "since version 1.6" in refusal(tmp_path / "old.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "a zip archive that torch.save did not write" in refusal(tmp_path / "zip.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a dict" in refusal(tmp_path / "list.pth")
